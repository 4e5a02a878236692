//! A smaller version of a seed's plan: what shrinking looks for, and what the command line can ask for again.

use std::fmt;

use clap::Args;
use onlyonce_testkit::simulated::{Fault, Mix};

use super::outbox::Taken;
use super::plan::{Behaviour, Plan};

#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct Cut {
    /// With --seed: only this many of its messages.
    #[arg(long, requires = "seed")]
    pub messages: Option<usize>,
    /// With --seed: only this many of its workers.
    #[arg(long, requires = "seed")]
    pub workers: Option<u64>,
    /// With --seed: only this many of its relays.
    #[arg(long, requires = "seed")]
    pub relays: Option<u64>,
    /// With --seed: only this many faults, the first.
    #[arg(long, requires = "seed")]
    pub faults: Option<usize>,
    /// With --seed: without these kinds of faults.
    #[arg(long, requires = "seed", value_delimiter = ',', value_parser = fault)]
    pub without: Vec<Fault>,
    /// With --seed: nobody is stopped or killed at random times.
    #[arg(long, requires = "seed")]
    pub no_restarts: bool,
    /// With --seed: each message is published once, no handler fails, and no queue refuses what is relayed.
    #[arg(long, requires = "seed")]
    pub plain: bool,
}

fn fault(name: &str) -> Result<Fault, String> {
    let mut all = Fault::ALL.into_iter();
    let found = all.find(|fault| name == format!("{fault:?}"));
    found.ok_or_else(|| format!("one of {:?}", Fault::ALL))
}

impl Cut {
    pub fn apply(&self, plan: &mut Plan) {
        plan.messages.truncate(self.messages.unwrap_or(usize::MAX));
        plan.workers = plan.workers.min(self.workers.unwrap_or(u64::MAX)).max(1);
        plan.mix = self
            .without
            .iter()
            .fold(plan.mix.clone(), |mix: Mix, fault| mix.with(*fault, 0.0));
        if let Some(outbox) = &mut plan.outbox {
            outbox.relays = outbox.relays.min(self.relays.unwrap_or(u64::MAX)).max(1);
        }
        plan.restarts &= !self.no_restarts;
        if self.plain {
            for message in &mut plan.messages {
                message.published.truncate(1);
                message.behaviour = Behaviour::Succeeds;
                message.malformed = false;
                for outgoing in &mut message.publishes {
                    outgoing.taken = Taken::AtOnce;
                }
            }
        }
    }

    /// Versions that are one step smaller than this one, the largest steps first.
    pub fn smaller(&self, plan: &Plan, faults: usize) -> Vec<Self> {
        let mut all = Vec::new();
        let mut offer = |change: &dyn Fn(&mut Self)| {
            let mut cut = self.clone();
            change(&mut cut);
            all.push(cut);
        };
        let messages = plan.messages.len();
        for fewer in [messages / 2, messages.saturating_sub(1)] {
            if (1..messages).contains(&fewer) {
                offer(&|cut| cut.messages = Some(fewer));
            }
        }
        if plan.workers > 1 {
            offer(&|cut| cut.workers = Some(plan.workers - 1));
        }
        let relays = plan.outbox.as_ref().map_or(1, |outbox| outbox.relays);
        if relays > 1 {
            offer(&|cut| cut.relays = Some(relays - 1));
        }
        if plan.restarts {
            offer(&|cut| cut.no_restarts = true);
        }
        if !self.plain {
            offer(&|cut| cut.plain = true);
        }
        for fault in Fault::ALL {
            if !self.without.contains(&fault) {
                offer(&|cut| cut.without.push(fault));
            }
        }
        for fewer in [faults / 2, faults.saturating_sub(1)] {
            if fewer < faults {
                offer(&|cut| cut.faults = Some(fewer));
            }
        }
        all
    }
}

/// As it is written on the command line.
impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(messages) = self.messages {
            write!(f, " --messages {messages}")?;
        }
        if let Some(workers) = self.workers {
            write!(f, " --workers {workers}")?;
        }
        if let Some(relays) = self.relays {
            write!(f, " --relays {relays}")?;
        }
        if let Some(faults) = self.faults {
            write!(f, " --faults {faults}")?;
        }
        if !self.without.is_empty() {
            let names: Vec<_> = self
                .without
                .iter()
                .map(|fault| format!("{fault:?}"))
                .collect();
            write!(f, " --without {}", names.join(","))?;
        }
        for (name, asked) in [("--no-restarts", self.no_restarts), ("--plain", self.plain)] {
            if asked {
                write!(f, " {name}")?;
            }
        }
        Ok(())
    }
}
