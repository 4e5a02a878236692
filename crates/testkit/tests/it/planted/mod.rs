//! Each suite notices the bugs that it is there for: the in-memory queue, store and outbox, with one bug planted at a time.
//!
//! A bug declares as gaps the checks that must fail. All others must pass, so a check that notices nothing, or too much,
//! fails here.

mod log;
mod outbox;
mod replay;
mod source;
mod store;

use onlyonce_testkit::Gap;

/// The checks that must notice a bug.
macro_rules! noticed_by {
    ($($check:ident)*) => {
        &[$(onlyonce_testkit::Gap { check: stringify!($check), why: "a planted bug" }),*]
    };
}
pub(crate) use noticed_by;

/// One suite for each bug, and the checks that must notice it. The module that plants has a `Bug` and a `Planted`.
macro_rules! plant {
    ($suite:ident; $($module:ident: $bug:ident [$($check:ident)*])*) => {
        plant! { $($suite $module: $bug [$($check)*])* }
    };
    ($($suite:ident $module:ident: $bug:ident [$($check:ident)*])*) => { $(
        mod $module {
            use super::*;
            const NOTICED_BY: Gaps = noticed_by!($($check)*);
            $suite!(#[tokio::test(start_paused = true)] Planted::new(Bug::$bug, NOTICED_BY));
        }
    )* };
}
pub(crate) use plant;

type Gaps = &'static [Gap];
