use std::panic::resume_unwind;

use onlyonce_core::{Error, ErrorKind};
use tokio::time::{Duration, sleep};

use super::faults::Disturbance;

/// What a client waits before it takes a request for lost.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) fn lost() -> Error {
    Error::new(ErrorKind::Timeout, "simulated: no answer")
}

pub(super) fn refused() -> Error {
    Error::new(ErrorKind::Other, "simulated: refused")
}

/// Sends a request to a server. Once it is under way it arrives even if the caller is gone.
pub(super) async fn send<T: Send + 'static>(
    disturbance: &Disturbance,
    request: impl Future<Output = T> + Send + 'static,
) -> Result<T, Error> {
    disturbance.before().await;
    if disturbance.lost || disturbance.refused {
        let error = if disturbance.lost { lost() } else { refused() };
        sleep(CLIENT_TIMEOUT).await;
        return Err(error);
    }
    let before = disturbance.before;
    let answer = if before.is_zero() {
        request.await
    } else {
        let arrives = tokio::spawn(async move {
            sleep(before).await;
            request.await
        });
        match arrives.await {
            Ok(answer) => answer,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                Err(_) => return Err(lost()),
            },
        }
    };
    disturbance.after().await;
    if disturbance.unanswered {
        sleep(CLIENT_TIMEOUT).await;
        return Err(lost());
    }
    if !disturbance.after.is_zero() {
        sleep(disturbance.after).await;
    }
    Ok(answer)
}
