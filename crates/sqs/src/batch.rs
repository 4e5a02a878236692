//! One request, several entries, one result for each.

use aws_sdk_sqs::types::BatchResultErrorEntry;
use onlyonce_core::Error;

/// An entry for each, its place for an id.
pub(crate) fn entries<T, E>(
    all: &[T],
    entry: impl Fn(String, &T) -> Result<E, Error>,
) -> Result<Vec<E>, Error> {
    let all = all.iter().enumerate();
    all.map(|(id, item)| entry(id.to_string(), item)).collect()
}

/// What became of one entry.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done,
    Refused(BatchResultErrorEntry),
    /// The answer does not mention it.
    Unmentioned,
}

/// What SQS said of each entry, in the entries' order. Their ids are their places.
pub(crate) fn outcomes<'a>(
    count: usize,
    done: impl IntoIterator<Item = &'a str>,
    refused: &[BatchResultErrorEntry],
) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = (0..count).map(|_| Outcome::Unmentioned).collect();
    let done = done.into_iter().map(|id| (id, Outcome::Done));
    let refused = refused
        .iter()
        .map(|entry| (entry.id(), Outcome::Refused(entry.clone())));
    for (id, outcome) in done.chain(refused) {
        let place = id.parse().ok().and_then(|at: usize| outcomes.get_mut(at));
        if let Some(place) = place {
            *place = outcome;
        }
    }
    outcomes
}
