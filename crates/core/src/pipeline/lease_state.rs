use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::driver::{Delivery, HeldClaim, Lease, Precondition, Receipt};

/// How long a delivery and its claim are ours, or a look-up counts, on the local monotonic clock.
pub(crate) struct LeaseState {
    pub(crate) receipt: Receipt,
    /// As it came; when it ends now, `deadlines` says.
    pub(crate) lease: Lease,
    deadlines: Mutex<Deadlines>,
    changed: Notify,
}

#[derive(Clone, Copy)]
struct Deadlines {
    source: Option<Instant>,
    /// For how long the lease was given, when the delivery came or by its last extension.
    length: Option<Duration>,
    /// Under which precondition it may run and be recorded, and until when.
    may_run: Option<(Precondition, Instant)>,
}

impl LeaseState {
    pub(crate) fn of(delivery: &Delivery) -> Arc<Self> {
        let until = delivery.lease.until;
        Arc::new(Self {
            receipt: delivery.receipt.clone(),
            lease: delivery.lease.clone(),
            deadlines: Mutex::new(Deadlines {
                source: until,
                length: until.map(|until| until.saturating_duration_since(Instant::now())),
                may_run: None,
            }),
            changed: Notify::new(),
        })
    }

    fn deadlines(&self) -> MutexGuard<'_, Deadlines> {
        self.deadlines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn precondition(&self) -> Option<Precondition> {
        self.deadlines()
            .may_run
            .map(|(precondition, _)| precondition)
    }

    pub(crate) fn held(&self) -> Option<HeldClaim> {
        self.precondition()?.claim()
    }

    pub(crate) fn may_run(&self, precondition: impl Into<Precondition>, until: Instant) {
        self.deadlines().may_run = Some((precondition.into(), until));
    }

    /// Forgets the claim and returns it; or forgets the look-up.
    pub(crate) fn forget_claim(&self) -> Option<HeldClaim> {
        let (precondition, _) = self.deadlines().may_run.take()?;
        precondition.claim()
    }

    /// The lease at the broker now ends at `until`, or has ended.
    pub(crate) fn extended(&self, until: Instant) {
        let mut deadlines = self.deadlines();
        deadlines.source = Some(until);
        deadlines.length = Some(until.saturating_duration_since(Instant::now()));
        drop(deadlines);
        self.changed.notify_waiters();
    }

    /// The claim `held` now ends at `until`, or has ended.
    pub(crate) fn renewed(&self, held: HeldClaim, until: Instant) {
        let mut deadlines = self.deadlines();
        if let Some((current, deadline)) = &mut deadlines.may_run
            && current.claim() == Some(held)
        {
            *deadline = until;
        }
        drop(deadlines);
        self.changed.notify_waiters();
    }

    /// When the lease at the broker ends and for how long it was given, for the lease renewer.
    pub(crate) fn source_deadline(&self) -> Option<(Instant, Duration)> {
        let Deadlines { source, length, .. } = *self.deadlines();
        source.zip(length)
    }

    /// The claim and when it ends, for the renewer.
    pub(crate) fn claim_deadline(&self) -> Option<(HeldClaim, Instant)> {
        let (precondition, until) = self.deadlines().may_run?;
        precondition.claim().map(|held| (held, until))
    }

    /// Whether what the lease was tied to has died.
    pub(crate) fn connection_is_lost(&self) -> bool {
        is_cancelled(self.lease.lost.as_ref())
    }

    /// Whether the broker may still be told anything about this delivery.
    pub(crate) fn leased(&self) -> bool {
        self.lease_lasts(Duration::ZERO)
    }

    fn deadline(&self) -> Option<Instant> {
        let Deadlines {
            source, may_run, ..
        } = *self.deadlines();
        match (source, may_run.map(|(_, until)| until)) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Whether lease and claim are both still ours.
    pub(crate) fn lasts(&self) -> bool {
        self.leased() && self.claim_lasts(Duration::ZERO)
    }

    fn length(&self) -> Duration {
        self.deadlines().length.unwrap_or_default()
    }

    /// Whether the lease lasts for `more`.
    pub(crate) fn lease_lasts(&self, more: Duration) -> bool {
        let until = self.deadlines().source;
        !self.connection_is_lost() && until.is_none_or(|d| d > Instant::now() + more)
    }

    /// For how long it can wait and still be run and settled in time, by a clock that is slow too: until half of the lease is left.
    pub(crate) fn spare(&self) -> Duration {
        let Some((until, length)) = self.source_deadline().filter(|_| self.leased()) else {
            return Duration::ZERO;
        };
        let left = until.saturating_duration_since(Instant::now());
        left.saturating_sub(length / 2)
    }

    fn claim_lasts(&self, more: Duration) -> bool {
        let may_run = self.deadlines().may_run;
        may_run.is_none_or(|(_, until)| until > Instant::now() + more)
    }

    /// Whether there is enough left to start a handler: an eighth of the lease, and of the claim.
    pub(crate) fn can_start(&self, claim_lease: Duration) -> bool {
        self.can_start_again() && self.claim_lasts(claim_lease / 8)
    }

    /// Whether there will be, once it is claimed again.
    pub(crate) fn can_start_again(&self) -> bool {
        !is_cancelled(self.lease.revoked.as_ref()) && self.lease_lasts(self.length() / 8)
    }

    /// Resolves when lease or claim has ended without having been renewed.
    pub(crate) async fn ended(&self) {
        loop {
            let changed = self.changed.notified();
            let deadline = self.deadline();
            if deadline.is_some_and(|d| d <= Instant::now()) {
                return;
            }
            tokio::select! {
                biased;
                () = changed => {}
                () = sleep_until_some(deadline) => {}
                () = cancelled(self.lease.lost.as_ref()) => return,
            }
        }
    }
}

fn is_cancelled(token: Option<&CancellationToken>) -> bool {
    token.is_some_and(CancellationToken::is_cancelled)
}

async fn sleep_until_some(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn cancelled(token: Option<&CancellationToken>) {
    match token {
        Some(token) => token.cancelled().await,
        None => std::future::pending().await,
    }
}
