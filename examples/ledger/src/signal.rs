//! The signals that ask for a graceful end.

/// Resolves on ctrl-c or SIGTERM.
#[cfg(unix)]
pub async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut sigterm) => tokio::select! {
            _ = sigterm.recv() => {}
            () = interrupted() => {}
        },
        Err(error) => {
            tracing::warn!(%error, "SIGTERM will end the process at once");
            interrupted().await;
        }
    }
}

/// Resolves on ctrl-c.
#[cfg(not(unix))]
pub async fn terminated() {
    interrupted().await;
}

async fn interrupted() {
    if let Err(error) = tokio::signal::ctrl_c().await {
        tracing::warn!(%error, "ctrl-c will end the process at once");
        std::future::pending().await
    }
}
