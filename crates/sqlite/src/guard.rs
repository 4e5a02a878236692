use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use rusqlite::Connection;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};

/// After this number of steps of SQLite's machine, some tens of microseconds, it is asked whether to go on.
const STEPS: i32 = 10_000;

/// The pragmas that a closure may give a value: they read, or write what is rolled back with the rest.
const PRAGMAS: [&str; 12] = [
    "application_id",
    "foreign_key_check",
    "foreign_key_list",
    "index_info",
    "index_list",
    "index_xinfo",
    "integrity_check",
    "quick_check",
    "table_info",
    "table_list",
    "table_xinfo",
    "user_version",
];

/// Keeps a user's closure, while one runs, from what would harm the others that share connection and transaction with it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guard(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    active: AtomicBool,
    interrupted: AtomicBool,
    until: Mutex<Until>,
}

/// For how long a closure may run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Until {
    pub(crate) deadline: Option<Instant>,
    /// Who waits for it.
    pub(crate) asker: Weak<()>,
}

impl Until {
    fn is_over(&self) -> bool {
        let late = self.deadline.is_some_and(|end| end <= Instant::now());
        late || self.asker.strong_count() == 0
    }
}

impl Guard {
    pub(crate) fn install(&self, conn: &mut Connection) -> rusqlite::Result<()> {
        let guard = self.clone();
        conn.authorizer(Some(move |context: AuthContext<'_>| {
            if guard.is_active() && endangers(&context.action) {
                Authorization::Deny
            } else {
                Authorization::Allow
            }
        }))?;
        // A closure whose SQL has rolled back the transaction is in autocommit from then on: none of its statements may
        // commit by itself.
        let guard = self.clone();
        conn.commit_hook(Some(move || guard.is_active()))?;
        let guard = self.clone();
        conn.progress_handler(STEPS, Some(move || guard.interrupts()))
    }

    pub(crate) fn begin(&self, until: Until) {
        *self.until() = until;
        self.0.interrupted.store(false, Relaxed);
        self.0.active.store(true, Relaxed);
    }

    /// Says whether a statement of the closure was interrupted.
    pub(crate) fn end(&self) -> bool {
        self.0.active.store(false, Relaxed);
        self.0.interrupted.load(Relaxed)
    }

    fn is_active(&self) -> bool {
        self.0.active.load(Relaxed)
    }

    fn interrupts(&self) -> bool {
        let interrupts = self.is_active() && self.until().is_over();
        self.0.interrupted.fetch_or(interrupts, Relaxed);
        interrupts
    }

    fn until(&self) -> MutexGuard<'_, Until> {
        self.0.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a user's closure must not do, because others share the transaction and the connection with it.
fn endangers(action: &AuthAction<'_>) -> bool {
    match action {
        AuthAction::Transaction { .. }
        | AuthAction::Savepoint { .. }
        | AuthAction::Attach { .. }
        | AuthAction::Detach { .. }
        | AuthAction::CreateTempTable { .. }
        | AuthAction::CreateTempView { .. }
        | AuthAction::CreateTempTrigger { .. } => true,
        AuthAction::Pragma {
            pragma_name,
            pragma_value: Some(_),
        } => !PRAGMAS
            .iter()
            .any(|name| pragma_name.eq_ignore_ascii_case(name)),
        AuthAction::Insert { table_name }
        | AuthAction::Delete { table_name }
        | AuthAction::DropTable { table_name }
        | AuthAction::AlterTable { table_name, .. }
        | AuthAction::CreateIndex { table_name, .. }
        | AuthAction::CreateTrigger { table_name, .. }
        | AuthAction::Update { table_name, .. } => {
            table_name.to_ascii_lowercase().starts_with("onlyonce_")
        }
        _ => false,
    }
}
