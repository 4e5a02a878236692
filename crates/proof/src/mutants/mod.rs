//! Bugs planted in the pipeline, each of which the simulation must notice.
//!
//! The code that ships has no switch for them: they are planted into a copy of it, which is built and simulated.

mod catalogue;
mod copy;
mod sources;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use catalogue::{MUTANTS, Mutant};

use crate::{Verdict, options};

/// Where the table goes.
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../core/docs/planted-bugs.md");

const NOT_NOTICED: &str = "**not noticed**";

/// What the simulation said of a bug.
struct Caught {
    seeds: u64,
    how: String,
}

pub fn run(options: &options::Mutants) -> Result<Verdict, String> {
    let sources = sources::digest()?;
    if options.unless_known && is_known(&sources)? {
        println!("mutants: all noticed in these sources, {sources}, when their table was written");
        return Ok(Verdict::Kept);
    }
    let program = copy::build()?;
    let mut most = 0;
    let mut table = String::from("| planted bug | noticed as | seeds needed |\n|---|---|---|\n");
    let mut missed = Vec::new();
    let chosen = |mutant: &&Mutant| mutant.name.contains(&options.only);
    let chosen: Vec<&Mutant> = MUTANTS.iter().filter(chosen).collect();
    for mutant in &chosen {
        let caught = simulate(&program, mutant.name, options.seeds)?;
        println!("{}", line(mutant, caught.as_ref()));
        let _ = writeln!(table, "{}", line(mutant, caught.as_ref()));
        if caught.is_none() {
            missed.push(mutant.name);
        }
        most = caught
            .map_or(options.seeds, |caught| caught.seeds)
            .max(most);
    }
    if let Some(caught) = simulate(&program, "", most)? {
        println!(
            "BROKEN without any planted bug, after {} seeds: {}",
            caught.seeds, caught.how
        );
        return Ok(Verdict::Broken);
    }
    println!("without any of them: {most} seeds, nothing broken");
    if options.write {
        write(&table, most, &sources)?;
    }
    let (all, caught) = (chosen.len(), chosen.len() - missed.len());
    println!("mutants: {caught} of {all} planted bugs noticed; missed: {missed:?}");
    Ok(if missed.is_empty() {
        Verdict::Kept
    } else {
        Verdict::Broken
    })
}

fn line(mutant: &Mutant, caught: Option<&Caught>) -> String {
    let (how, seeds) = caught.map_or((NOT_NOTICED, String::new()), |caught| {
        (&caught.how, caught.seeds.to_string())
    });
    format!("| `{}`: {} | {how} | {seeds} |", mutant.name, mutant.bug)
}

/// Runs the simulation with one bug planted; says which seed of the first noticed it, and how.
fn simulate(program: &Path, bug: &str, seeds: u64) -> Result<Option<Caught>, String> {
    let output = Command::new(program)
        .args(["simulate", "--no-shrink"])
        .args(["--first", "1"])
        .args(["--seeds", &seeds.to_string()])
        .env("ONLYONCE_PLANTED", bug)
        .output()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let broken = text
        .lines()
        .find_map(|line| line.strip_prefix("BROKEN by seed "));
    match (
        broken.and_then(|line| line.split_once(": ")),
        output.status.code(),
    ) {
        (Some((seed, how)), Some(1)) => {
            let seed: u64 = seed.parse().map_err(|_| format!("`{seed}` is no seed"))?;
            Ok(Some(Caught {
                seeds: seed,
                how: how.to_owned(),
            }))
        }
        (None, Some(0)) => Ok(None),
        (_, code) => Err(format!(
            "the simulation with `{bug}` ended with {code:?}:\n{text}"
        )),
    }
}

/// Whether the table was written for these sources, and has all bugs as noticed.
fn is_known(sources: &str) -> Result<bool, String> {
    let text = std::fs::read_to_string(TABLE).map_err(|error| format!("{TABLE}: {error}"))?;
    Ok(text.contains(sources) && !text.contains(NOT_NOTICED))
}

fn write(table: &str, seeds: u64, sources: &str) -> Result<(), String> {
    let text = format!(
        "# Planted bugs\n\nWritten by `cargo run --bin proof -- mutants --write`. Each bug is planted into a copy of the code, which is then\n\
         simulated with the seeds from 1 on. *Seeds needed* is the first seed that noticed. Without any of them, the seeds 1 to {seeds} break nothing.\n\n\
         The code of core, testkit and the simulation had the digest `{sources}`; `./tests/run` plants the bugs again when that has changed.\n\n{table}"
    );
    std::fs::write(TABLE, text).map_err(|error| format!("{TABLE}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bug_has_a_name_of_its_own() {
        let mut names: Vec<_> = MUTANTS.iter().map(|mutant| mutant.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), MUTANTS.len());
    }
}
