//! Every fuzz target: its corpus, then changes of it that are the same in every run, so that a commit that passed
//! passes again. `ONLYONCE_SECONDS=<seconds> cargo test -p fuzz` looks for new ones for that time in each target. A failure
//! prints a seed; `ONLYONCE_SEED=<seed> cargo test -p fuzz <target>` runs that input again.

#![allow(clippy::unwrap_used, reason = "its helpers are test code, too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fuzz::{TARGETS, Target};

/// No input takes this long unless something hangs.
const TOO_LONG: Duration = Duration::from_secs(60);
/// Of an input.
const MOST: usize = 1_000;

/// Targets run one after another, so that it is clear whose panic it was.
static TURN: Mutex<()> = Mutex::new(());
/// Panics so far, of whatever thread: a target may have threads of its own, whose panics nobody else notices.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            print(panic);
        }));
    });
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let directory = root().join("corpus").join(name);
    let files = fs::read_dir(&directory).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        (file, fs::read(path).unwrap())
    });
    let mut files: Vec<_> = files.collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus in {}", directory.display());
    files
}

/// Runs the target on inputs that are told by name before, one by one.
fn run(name: &str, inputs: u64, target: Target, told: &Sender<String>) {
    let one = |label: String, input: &[u8]| {
        told.send(label).unwrap();
        let before = PANICS.load(Ordering::SeqCst);
        target(input);
        assert_eq!(PANICS.load(Ordering::SeqCst), before, "a thread panicked");
    };
    let corpus = corpus(name);
    let random = |seed| {
        let input = mutated(&corpus, &mut fastrand::Rng::with_seed(seed));
        one(format!("ONLYONCE_SEED={seed}"), &input);
    };
    if let Some(seed) = number("ONLYONCE_SEED") {
        return random(seed);
    }
    for (file, input) in &corpus {
        one(format!("corpus/{name}/{file}"), input);
    }
    let Some(seconds) = number("ONLYONCE_SECONDS") else {
        return (0..inputs).for_each(random);
    };
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(seconds) {
        random(fastrand::u64(..));
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is a number")),
    )
}

fn bounded(name: &str, inputs: u64) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    count_panics();
    let (_, target) = *TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let (told, labels) = mpsc::channel();
    let name = name.to_owned();
    let runner = thread::spawn(move || run(&name, inputs, target, &told));
    let (mut last, mut ran) = (String::from("nothing"), 0);
    loop {
        match labels.recv_timeout(TOO_LONG) {
            Ok(label) => {
                (last, ran) = (label, ran + 1);
            }
            Err(RecvTimeoutError::Timeout) => panic!("it hangs at {last}"),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    runner
        .join()
        .unwrap_or_else(|_| panic!("to see it again: {last}"));
    println!("{ran} inputs");
}

/// One of the corpus with some changes, or some bytes of no origin.
fn mutated(corpus: &[(String, Vec<u8>)], random: &mut fastrand::Rng) -> Vec<u8> {
    let mut input = match random.u8(..8) {
        0 => (0..random.usize(..200)).map(|_| random.u8(..)).collect(),
        _ => random.choice(corpus).unwrap().1.clone(),
    };
    for _ in 0..random.usize(..8) {
        mutate(&mut input, corpus, random);
    }
    input.truncate(MOST);
    input
}

fn mutate(input: &mut Vec<u8>, corpus: &[(String, Vec<u8>)], random: &mut fastrand::Rng) {
    let (from, to) = range(input.len(), random);
    match random.u8(..6) {
        0 if from < input.len() => input[from] ^= 1 << random.u8(..8),
        1 if from < input.len() => {
            input[from] = random.choice(*b"\0\x01\x7f\x80\xff@:/?#%&=9").unwrap()
        }
        2 => drop(input.drain(from..to)),
        3 => {
            let again = input[from..to].to_vec();
            input.splice(to..to, again);
        }
        4 => {
            let bytes = (0..random.usize(..10)).map(|_| random.u8(..));
            input.splice(from..from, bytes.collect::<Vec<_>>());
        }
        _ => {
            let other = &random.choice(corpus).unwrap().1;
            let (begin, end) = range(other.len(), random);
            input.splice(from..to, other[begin..end].to_vec());
        }
    }
}

fn range(len: usize, random: &mut fastrand::Rng) -> (usize, usize) {
    let (a, b) = (random.usize(..=len), random.usize(..=len));
    (a.min(b), a.max(b))
}

macro_rules! bounded {
    ($($target:ident = $inputs:literal)*) => {
        $(#[test]
        fn $target() {
            bounded(stringify!($target), $inputs);
        })*

        #[test]
        fn every_target_is_here_and_known_to_libfuzzer() {
            let here = [$(stringify!($target)),*];
            assert_eq!(here.as_slice(), TARGETS.map(|(name, _)| name));
            let manifest = fs::read_to_string(root().join("cargo-fuzz/Cargo.toml")).unwrap();
            for name in here {
                assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
                let program = format!("cargo-fuzz/fuzz_targets/{name}.rs");
                let program = fs::read_to_string(root().join(program)).unwrap();
                assert!(program.contains(&format!("fuzz::{name}(data)")), "{name}");
            }
        }
    };
}

// About two seconds each.
bounded! {
    keys = 20_000
    params = 100_000
    pipeline = 1_000
    pubsub_messages = 50_000
    pubsub_received = 50_000
    rabbitmq_frames = 20_000
    rabbitmq_headers = 20_000
    rabbitmq_messages = 50_000
    secrets = 10_000
    sqlite_files = 1_000
    sqlite_records = 300
    sqlite_rows = 300
    sqlite_settings = 5_000
    sqs_messages = 50_000
    sqs_received = 50_000
    urls = 30_000
}
