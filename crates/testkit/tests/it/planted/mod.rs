//! Each suite notices the bugs that it is there for: the in-memory queue and store, with one bug planted at a time.
//!
//! A bug declares as gaps the checks that must fail. All others must pass, so a check that notices nothing, or too much,
//! fails here.

mod log;
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

type Gaps = &'static [Gap];
