//! Where the emulators do otherwise than AWS, as a table that is held against them: `./tests/run sqs`. A deviation that
//! was fixed is noticed, and so is one that nothing else covers.

mod probes;

use crate::common::Emulator;
use table::DEVIATIONS;

/// What somebody does whom we asked, in a few words.
struct Deviation {
    name: &'static str,
    aws: &'static str,
    /// Where AWS says so, or where it was measured there.
    source: &'static str,
    ministack: &'static str,
    localstack: &'static str,
    /// The test, without an emulator, of how AWS's way is dealt with.
    covered_by: &'static str,
}

impl Deviation {
    fn assert_seen(&self, emulator: Emulator, seen: &str) {
        let expected = match emulator {
            Emulator::MiniStack => self.ministack,
            Emulator::LocalStack => self.localstack,
        };
        let Self { aws, source, .. } = self;
        assert_eq!(
            seen, expected,
            "{emulator:?} changed; AWS: {aws}, says {source}"
        );
    }
}

fn deviation(name: &str) -> &'static Deviation {
    let mut all = DEVIATIONS.iter();
    all.find(|deviation| deviation.name == name).unwrap()
}

/// The table, and a test of each row on each emulator.
macro_rules! deviations {
    ($($name:ident { $($fields:tt)+ })+) => {
        pub(crate) const DEVIATIONS: &[Deviation] = &[$(Deviation {
            name: stringify!($name),
            $($fields)+
        }),+];
        mod ministack {
            use super::*;
            $(#[tokio::test]
            #[ignore = "needs MiniStack: ./tests/run sqs"]
            async fn $name() {
                let seen = probes::$name(Emulator::MiniStack).await;
                deviation(stringify!($name)).assert_seen(Emulator::MiniStack, &seen);
            })+
        }
        mod localstack {
            use super::*;
            $(#[tokio::test]
            #[ignore = "needs LocalStack: ./tests/run sqs"]
            async fn $name() {
                let seen = probes::$name(Emulator::LocalStack).await;
                deviation(stringify!($name)).assert_seen(Emulator::LocalStack, &seen);
            })+
        }
    };
}

mod table;

/// Whether a test of this name is run wherever the crate is tested.
fn is_test(path: &str) -> bool {
    let (file, name) = path.rsplit_once("::").unwrap();
    let source = match file {
        "dead_letters" => include_str!("../scripted/dead_letters.rs"),
        "errors" => include_str!("../scripted/errors.rs"),
        "receiving" => include_str!("../scripted/receiving.rs"),
        "sending" => include_str!("../scripted/sending.rs"),
        "settling" => include_str!("../scripted/settling.rs"),
        "message::tests" => include_str!("../../../src/message/tests.rs"),
        _ => return false,
    };
    [
        format!("#[tokio::test(start_paused = true)]\nasync fn {name}()"),
        format!("#[test]\nfn {name}()"),
    ]
    .iter()
    .any(|test| source.contains(test))
}

#[test]
fn every_deviation_is_one_and_is_covered() {
    for deviation in DEVIATIONS {
        let Deviation { name, aws, .. } = deviation;
        let both = [deviation.ministack, deviation.localstack];
        assert!(
            both.iter().any(|seen| seen != aws),
            "{name} deviates no more"
        );
        assert!(deviation.source.starts_with("https://"), "{name}");
        let covered_by = deviation.covered_by;
        assert!(is_test(covered_by), "{name}: there is no test {covered_by}");
    }
    assert!(!is_test("settling::no_such_test") && !is_test("nowhere::acks_go_side_by_side"));
}
