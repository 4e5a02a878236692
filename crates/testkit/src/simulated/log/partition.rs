use std::sync::Arc;

use onlyonce_core::driver::{AckWindow, Delivery, Disposition, Lease, Receipt, SettleResult};
use onlyonce_core::{Error, ErrorKind, Message};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::LogReceipt;

/// Messages in order, up to where they are committed, and who has them now.
#[derive(Debug)]
pub(super) struct Partition {
    number: usize,
    messages: Vec<Arc<Message>>,
    committed: u64,
    /// Counts assignments and rewinds: what was delivered before one of them is another delivery.
    generation: u64,
    owner: Option<Owner>,
}

/// What lasts for as long as a consumer has the partition.
#[derive(Debug)]
struct Owner {
    member: u64,
    /// The generation of the assignment.
    since: u64,
    /// By offset.
    window: AckWindow<Out>,
    /// The offset that is delivered next.
    next: u64,
    /// It is to be taken away then.
    until: Option<Instant>,
    revoked: CancellationToken,
    lost: CancellationToken,
}

/// A message that was delivered and is not acked.
#[derive(Debug)]
struct Out {
    generation: u64,
    /// It waits for its next delivery.
    given_back: bool,
    lost: CancellationToken,
}

impl Partition {
    pub(super) fn new(number: usize) -> Self {
        Self {
            number,
            messages: Vec::new(),
            committed: 0,
            generation: 0,
            owner: None,
        }
    }

    pub(super) fn append(&mut self, message: &Message) {
        let mut message = message.clone();
        message.broker_id = Some(format!("{}/{}", self.number, self.messages.len()));
        message.sender = None;
        self.messages.push(Arc::new(message));
    }

    pub(super) fn committed(&self) -> u64 {
        self.committed
    }

    pub(super) fn end(&self) -> u64 {
        self.messages.len() as u64
    }

    pub(super) fn owner(&self) -> Option<u64> {
        self.owner.as_ref().map(|owner| owner.member)
    }

    /// When it is to be taken away from its owner, who has been told.
    pub(super) fn until(&self) -> Option<Instant> {
        self.owner.as_ref()?.until
    }

    /// Whether its owner has nothing in hand.
    pub(super) fn is_idle(&self) -> bool {
        let owner = self.owner.as_ref();
        owner.is_none_or(|owner| owner.window.iter().all(|(_, out)| out.given_back))
    }

    pub(super) fn assign(&mut self, member: u64) {
        self.generation += 1;
        self.owner = Some(Owner {
            member,
            since: self.generation,
            window: AckWindow::starting_at(self.committed),
            next: self.committed,
            until: None,
            revoked: CancellationToken::new(),
            lost: CancellationToken::new(),
        });
    }

    /// Tells the owner that the partition will be taken away.
    pub(super) fn revoke(&mut self, until: Instant) {
        if let Some(owner) = &mut self.owner {
            owner.until = Some(until);
            owner.revoked.cancel();
        }
    }

    /// Takes it away.
    pub(super) fn release(&mut self) {
        if let Some(owner) = self.owner.take() {
            owner.revoked.cancel();
            owner.lost.cancel();
        }
    }

    /// The next message for `member`, if the partition is its own and there is one.
    pub(super) fn take(&mut self, member: u64) -> Option<Delivery> {
        let generation = self.generation;
        let owner = self.owner.as_mut()?;
        if owner.member != member || owner.until.is_some() {
            return None;
        }
        while owner.window.is_settled(owner.next) {
            owner.next += 1;
        }
        let offset = owner.next;
        let message = self.messages.get(usize::try_from(offset).ok()?)?;
        owner.next += 1;
        let lost = owner.lost.child_token();
        let out = Out {
            generation,
            given_back: false,
            lost: lost.clone(),
        };
        match owner.window.get_mut(offset) {
            Some(again) => *again = out,
            None => {
                owner.window.push(out);
            }
        }
        let receipt = Receipt::new(LogReceipt {
            partition: self.number,
            offset,
            generation,
        });
        let lease = Lease::default()
            .tied_to(lost)
            .revoked_by(owner.revoked.clone());
        let mut delivery = Delivery::new(Message::default(), receipt, lease);
        delivery.message = message.clone();
        Some(delivery)
    }

    /// Notes what a settlement wants. What was given back waits for the [`rewind`](Self::rewind) that ends the batch: others
    /// of the batch are not to lose their leases by it.
    pub(super) fn note(
        &mut self,
        member: u64,
        receipt: LogReceipt,
        wanted: &Disposition,
    ) -> SettleResult {
        let LogReceipt {
            offset, generation, ..
        } = receipt;
        let current = self.generation;
        let Some(owner) = self.owner.as_mut().filter(|owner| owner.member == member) else {
            return SettleResult::LeaseLost;
        };
        let is_ack = match wanted {
            Disposition::Ack => true,
            Disposition::Nack { delay } if delay.is_zero() => false,
            Disposition::Nack { .. } => return cannot("delay what is given back"),
            Disposition::DeadLetter { .. } => return cannot("dead-letter"),
        };
        let acked_before =
            owner.window.is_settled(offset) && (owner.since..=current).contains(&generation);
        match owner.window.get_mut(offset) {
            Some(out) if out.generation == generation && !is_ack => {
                out.given_back = true;
                SettleResult::Applied
            }
            Some(out) if out.generation == generation && !out.given_back => {
                owner.window.settle(offset);
                SettleResult::Applied
            }
            None if is_ack && acked_before => SettleResult::Applied,
            _ => SettleResult::LeaseLost,
        }
    }

    /// Goes back to the first message that was given back, and delivers everything from there on again, except what is
    /// acked. What of it is still in hand has lost its lease: else it could overtake what comes again.
    ///
    /// A partition that is being taken away delivers nothing more, so nothing has to be taken from its owner.
    pub(super) fn rewind(&mut self) {
        let Some(owner) = self.owner.as_mut().filter(|owner| owner.until.is_none()) else {
            return;
        };
        let is_back =
            |(offset, out): (u64, &Out)| (out.given_back && offset < owner.next).then_some(offset);
        let Some(first) = owner.window.iter().find_map(is_back) else {
            return;
        };
        for (_, out) in owner.window.iter_from(first) {
            out.given_back = true;
            out.lost.cancel();
        }
        owner.next = first;
        self.generation += 1;
    }

    /// Commits up to the first message that is not acked.
    pub(super) fn commit(&mut self) {
        if let Some(owner) = &self.owner {
            self.committed = owner.window.position();
        }
    }
}

fn cannot(what: &str) -> SettleResult {
    SettleResult::Unknown(Error::new(
        ErrorKind::Other,
        format!("simulated: a log cannot {what}"),
    ))
}
