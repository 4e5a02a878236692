//! How long a claim and a message take that come alone, beside many records and beside none.

use std::time::{Duration, Instant};

use onlyonce::driver::{ClaimResult, HeldClaim, Owner, Store as _};

use super::{Args, Server, Stored, claim_of, millis, quantile};
use crate::Error;
use crate::measure::{Summary, ratio};

const LEASE: Duration = Duration::from_secs(60);

/// Of one store: how long each try took, in milliseconds, by round.
#[derive(Default)]
struct Took {
    claims: Vec<Vec<f64>>,
    messages: Vec<Vec<f64>>,
}

pub(super) async fn compare(server: &Server, args: &Args) -> Result<(), Error> {
    let stores = [Stored::new(server).await?, Stored::new(server).await?];
    let began = Instant::now();
    stores[1].fill(args.records).await?;
    stores[0].run("ANALYZE {}record").await?;
    tell_size(&stores[1], began.elapsed()).await?;
    let mut took: [Took; 2] = Default::default();
    let owner = Owner::random();
    for round in 0..args.rounds {
        for of_store in &mut took {
            of_store.claims.push(Vec::with_capacity(args.tries));
            of_store.messages.push(Vec::with_capacity(args.tries));
        }
        for n in round * args.tries..(round + 1) * args.tries {
            // Turn by turn, so that what else the machine does slows both; who is first is second the next time.
            for which in [n % 2, 1 - n % 2] {
                let (stored, took) = (&stores[which], &mut took[which]);
                took.claims[round].push(claim(stored, owner, n as u64).await?);
                let began = Instant::now();
                stored.message(n as u64).await?;
                took.messages[round].push(millis(began.elapsed()));
            }
        }
    }
    tell(args, &took);
    for stored in stores {
        stored.end().await?;
    }
    Ok(())
}

/// Claims a key that nobody has claimed; it is released without being measured.
async fn claim(stored: &Stored, owner: Owner, n: u64) -> Result<f64, Error> {
    let claim = claim_of(n);
    let began = Instant::now();
    let answer = stored.store.claim(owner, &[claim], LEASE).await?;
    let took = millis(began.elapsed());
    let [ClaimResult::Acquired { token, .. }] = *answer.as_slice() else {
        return Err(format!("the key is not new: {answer:?}").into());
    };
    let held = HeldClaim::new(claim.key, token);
    stored.store.release(&[held]).await?;
    Ok(took)
}

#[expect(clippy::print_stdout, reason = "the benchmark's output")]
async fn tell_size(many: &Stored, took: Duration) -> Result<(), Error> {
    let count = many.count().await?;
    let (tables, indexes) = many.size().await?.per(count);
    println!(
        "{count} records, filled in with random keys within {:.0} s: {tables:.1} bytes each in tables, {indexes:.1} in indexes, {:.1} together",
        took.as_secs_f64(),
        tables + indexes
    );
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the benchmark's output")]
fn tell(args: &Args, took: &[Took; 2]) {
    println!(
        "\n{} claims and messages per store and round, one at a time, {} rounds: milliseconds, median (least–most) of the rounds\n",
        args.tries, args.rounds
    );
    println!(
        "| | beside none | beside {} | × |\n|---|---|---|---|",
        args.records
    );
    tell_kind(
        "`Store::claim` of one key",
        [&took[0].claims, &took[1].claims],
    );
    tell_kind(
        "a message, transactional",
        [&took[0].messages, &took[1].messages],
    );
}

#[expect(clippy::print_stdout, reason = "the benchmark's output")]
fn tell_kind(name: &str, rounds: [&Vec<Vec<f64>>; 2]) {
    for (which, share) in [("median", 0.5), ("99th percentile", 0.99)] {
        let [none, many] = rounds.map(|rounds| -> Vec<f64> {
            rounds.iter().map(|round| quantile(round, share)).collect()
        });
        let of = |values: &[f64]| Summary::of(values.iter().copied());
        println!(
            "| {name}, {which} | {:.3} | {:.3} | {} |",
            of(&none),
            of(&many),
            ratio(&many, &none)
        );
    }
}
