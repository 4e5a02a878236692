//! What chance makes of the changes that were not synced.

use fastrand::Rng;

use super::disk::Fate;

/// Decides about one change after another.
#[derive(Debug)]
pub struct Luck {
    rng: Rng,
    manner: Manner,
    /// How many were decided about.
    decided: usize,
}

/// Chance alone hardly ever keeps everything but one, or loses all that came after something. Those are the mistakes that
/// are worth looking for, so each has its share.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// The disk had written nothing yet,
    Nothing,
    /// or all of it,
    Everything,
    /// or the first few, in their order: the last of them in part,
    First(usize),
    /// or all but this one,
    AllBut(usize),
    /// or only this one,
    Only(usize),
    /// or any. Percent that are there, and of them those that are torn.
    Any { kept: u8, torn: u8 },
}

impl Luck {
    /// What this seed gives, where `changes` changes are to be decided about.
    pub fn draw(seed: u64, changes: usize) -> Self {
        let mut rng = Rng::with_seed(seed);
        let one = rng.usize(0..=changes.saturating_sub(1));
        let manner = match rng.u8(0..10) {
            0 => Manner::Nothing,
            1 => Manner::Everything,
            2..4 => Manner::First(one),
            4 => Manner::AllBut(one),
            5 => Manner::Only(one),
            _ => Manner::Any {
                kept: rng.u8(1..=99),
                torn: rng.u8(0..=100),
            },
        };
        Self {
            rng,
            manner,
            decided: 0,
        }
    }

    /// The disk had written all of it.
    pub fn everything() -> Self {
        Self {
            rng: Rng::with_seed(0),
            manner: Manner::Everything,
            decided: 0,
        }
    }

    pub fn next(&mut self) -> Fate {
        let this = self.decided;
        self.decided += 1;
        let kept = match self.manner {
            Manner::Nothing => false,
            Manner::Everything => true,
            Manner::First(many) if this == many => return Fate::Torn,
            Manner::First(many) => this < many,
            Manner::AllBut(one) => this != one,
            Manner::Only(one) => this == one,
            Manner::Any { kept, torn } if self.rng.u8(0..100) < kept => {
                let whole = self.rng.u8(0..100) >= torn;
                return if whole { Fate::Kept } else { Fate::Torn };
            }
            Manner::Any { .. } => false,
        };
        if kept { Fate::Kept } else { Fate::Lost }
    }

    pub fn keeps_sector(&mut self) -> bool {
        self.rng.bool()
    }

    /// Whether a file has become longer without what made it so.
    pub fn grows(&mut self) -> bool {
        !matches!(self.manner, Manner::Nothing) && self.rng.bool()
    }

    /// A byte that nobody wrote there.
    pub fn rubbish(&mut self) -> u8 {
        self.rng.u8(..)
    }
}
