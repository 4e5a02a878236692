//! What the demo says before and after.
#![expect(clippy::print_stdout, reason = "the program's output")]

use std::path::Path;

use crate::demo::Tally;
use crate::options::Demo;
use crate::verdict::Verdict;

pub fn introduce(options: &Demo, seed: u64, folder: &Path) {
    println!(
        "{} transfers, 10 % of them sent twice, into an embedded queue; {} SIGKILLs, lost acks, failing commits.",
        options.transfers, options.kills
    );
    println!(
        "Seed {seed} (worker n rolls its faults with {seed} + n), folder {}.\n",
        folder.display()
    );
}

/// Prints the table; whether everything is as it should be.
pub fn conclude(tally: &Tally, verdict: &Verdict) -> bool {
    let (sent, workers, audit) = (&tally.sent, &tally.workers, &verdict.audit);
    println!("{:<54}{:>12}", "messages sent", sent.messages);
    println!("{:<54}{:>12}", "  different transfers", sent.transfers);
    println!("{:<54}{:>12}", "  sent twice", sent.duplicates);
    println!("{:<54}{:>12}", "  poison", sent.poison);
    println!("{:<54}{:>12}", "worker killed with SIGKILL", tally.kills);
    println!("{:<54}{:>12}", "deliveries (*)", workers.received);
    println!(
        "{:<54}{:>12}",
        "duplicates suppressed (*)", workers.duplicates
    );
    println!(
        "{:<54}{:>12}",
        "handlers that failed, and were rolled back (*)", workers.failed
    );
    println!("{:<54}{:>12}", "dead-lettered", tally.dead_letters);
    println!("{:<54}{:>12}", "left in the queue", tally.left);
    println!("{:<54}{:>12}", "applied once", verdict.applied);
    println!("{:<54}{:>12}", "applied twice", verdict.applied_twice);
    println!("{:<54}{:>12}", "lost", verdict.lost);
    println!(
        "{:<54}{:>12}",
        "half applied, wrong or unknown",
        verdict.wrong + verdict.unknown
    );
    println!("{:<54}{:>12}", "sum of all balances", audit.sum_of_balances);
    println!(
        "\n(*) at least: a killed worker takes its last counts with it. The rest is read from the tables."
    );
    let rate = sent.messages as f64 / tally.took.as_secs_f64();
    println!(
        "{:.1} s, {rate:.0} messages a second.",
        tally.took.as_secs_f64()
    );
    let fine = verdict.is_fine() && tally.left == 0 && tally.dead_letters == sent.poison;
    match fine {
        true => println!("Every transfer took effect once."),
        false => println!("NOT as it should be: {verdict:?}"),
    }
    fine
}
