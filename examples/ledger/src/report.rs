//! A pipeline's counts as JSON: one line each on stdout, the last one when the worker ends by itself.

use std::sync::Arc;
use std::time::Duration;

use onlyonce::{Counters, Report};
use serde::{Deserialize, Serialize};

macro_rules! figures {
    ($($name:ident),+ $(,)?) => {
        /// The counts of one worker, or of several together.
        #[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
        pub struct Figures {
            $(pub $name: u64,)+
        }

        impl From<Report> for Figures {
            fn from(report: Report) -> Self {
                Self { $($name: report.$name,)+ }
            }
        }

        impl std::ops::AddAssign for Figures {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)+
            }
        }
    };
}

figures!(
    received,
    applied,
    duplicates,
    failed,
    retried,
    dead_lettered,
    conflicts,
    uncertain,
    cancelled,
    fenced,
    given_back,
    settled,
    lease_lost,
    unknown,
    lost,
);

/// Prints the counts so often, until the process ends.
pub fn print_every(every: Duration, counters: Arc<Counters>) {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(every);
        loop {
            ticks.tick().await;
            print(counters.report());
        }
    });
}

/// Prints the counts.
#[expect(clippy::print_stdout, reason = "the program's output")]
pub fn print(report: Report) {
    let figures = serde_json::to_string(&Figures::from(report));
    println!("{}", figures.unwrap_or_default());
}
