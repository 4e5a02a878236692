//! Where Google's emulator does otherwise than the service, as a table that is held against it: `./tests/run pubsub`. A
//! deviation that was fixed is noticed, and so is one that nothing else covers.

mod probes;

use table::DEVIATIONS;

/// What somebody does whom we asked, in a few words.
struct Deviation {
    name: &'static str,
    service: &'static str,
    /// Where Google says so.
    source: &'static str,
    emulator: &'static str,
    /// The test, without an emulator, of how the service's way is dealt with.
    covered_by: &'static str,
}

impl Deviation {
    fn assert_seen(&self, seen: &str) {
        let Self {
            service, source, ..
        } = self;
        assert_eq!(
            seen, self.emulator,
            "the emulator changed; the service: {service}, says {source}"
        );
    }
}

fn deviation(name: &str) -> &'static Deviation {
    let mut all = DEVIATIONS.iter();
    all.find(|deviation| deviation.name == name).unwrap()
}

/// The table, and a test of each row.
macro_rules! deviations {
    ($($name:ident { $($fields:tt)+ })+) => {
        pub(crate) const DEVIATIONS: &[Deviation] = &[$(Deviation {
            name: stringify!($name),
            $($fields)+
        }),+];
        $(#[tokio::test]
        #[ignore = "needs the Pub/Sub emulator: ./tests/run pubsub"]
        async fn $name() {
            let seen = probes::$name().await;
            deviation(stringify!($name)).assert_seen(&seen);
        })+
    };
}

mod table;

/// Whether a test of this name is run wherever the crate is tested.
fn is_test(path: &str) -> bool {
    let (file, name) = path.rsplit_once("::").unwrap();
    let source = match file {
        "inspecting" => include_str!("../scripted/inspecting.rs"),
        "receiving" => include_str!("../scripted/receiving.rs"),
        "sending" => include_str!("../scripted/sending.rs"),
        "settling" => include_str!("../scripted/settling.rs"),
        "message::tests" => include_str!("../../../src/message/tests.rs"),
        _ => return false,
    };
    [
        format!("#[tokio::test(start_paused = true)]\nasync fn {name}()"),
        format!("#[tokio::test]\nasync fn {name}()"),
        format!("#[test]\nfn {name}()"),
    ]
    .iter()
    .any(|test| source.contains(test))
}

#[test]
fn every_deviation_is_one_and_is_covered() {
    for deviation in DEVIATIONS {
        let Deviation { name, service, .. } = deviation;
        assert_ne!(deviation.emulator, *service, "{name} deviates no more");
        assert!(deviation.source.starts_with("https://"), "{name}");
        let covered_by = deviation.covered_by;
        assert!(is_test(covered_by), "{name}: there is no test {covered_by}");
    }
    assert!(!is_test("settling::no_such_test") && !is_test("nowhere::each_ack_has_its_own_answer"));
}
