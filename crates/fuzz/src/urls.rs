use std::fmt::Write as _;
use std::sync::LazyLock;

use arbitrary::{Result, Unstructured};
use onlyonce::ErrorKind;
use onlyonce::pubsub::{Config as PubSub, PubSubSink, PubSubSource};
use onlyonce::rabbitmq::{Config as Rabbit, RabbitSink, RabbitSource};
use onlyonce::sqlite::Config as Sqlite;
use onlyonce::sqs::{Config as Sqs, SqsSink, SqsSource};
use tokio::runtime::Runtime;

/// Nothing here waits for anything.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));

/// A URL of any kind: it is taken or is an error of configuration, and everybody agrees about it.
pub fn urls(data: &[u8]) {
    let Ok(url) = std::str::from_utf8(data) else {
        return;
    };
    let rabbit = url.parse::<Rabbit>();
    let source = rabbit.as_ref().ok().cloned().map(RabbitSource::new);
    let scheme = url::Url::parse(url).map(|url| url.scheme().to_owned());
    match scheme.as_deref() {
        Ok("amqp" | "amqps") => {
            let made = RUNTIME.block_on(onlyonce::source(url));
            assert_eq!(made.is_ok(), source.is_some_and(|source| source.is_ok()));
            check(made.map(|source| source.name().to_owned()));
            check(RUNTIME.block_on(onlyonce::sink(url)).map(|_| String::new()));
        }
        Ok("sqs" | "arn" | "http" | "https") => {
            let parsed = url.parse::<Sqs>();
            let made = RUNTIME.block_on(onlyonce::source(url));
            assert_eq!(made.is_ok(), parsed.is_ok());
            check(made.map(|source| source.name().to_owned()));
            check(RUNTIME.block_on(onlyonce::sink(url)).map(|_| String::new()));
            check(parsed.map(|config| format!("{config:?}")));
        }
        Ok("pubsub") => {
            let parsed = url.parse::<PubSub>();
            let source = parsed.as_ref().ok().cloned().map(PubSubSource::new);
            let made = RUNTIME.block_on(onlyonce::source(url));
            assert_eq!(made.is_ok(), source.is_some_and(|source| source.is_ok()));
            check(made.map(|source| source.name().to_owned()));
            check(RUNTIME.block_on(onlyonce::sink(url)).map(|_| String::new()));
            check(parsed.map(|config| format!("{config:?}")));
        }
        // Opening it would write a file.
        Ok("sqlite") => {}
        // A queue in memory stays for as long as the process.
        Ok("memory") if url.len() > 9 => {}
        _ => {
            assert!(rabbit.is_err());
            check(
                RUNTIME
                    .block_on(onlyonce::source(url))
                    .map(|source| source.name().to_owned()),
            );
            check(
                RUNTIME
                    .block_on(onlyonce::store(url))
                    .map(|_| String::new()),
            );
        }
    }
    check(rabbit.map(|config| format!("{config:?} {}", config.endpoint())));
    check(url.parse::<Sqlite>().map(|config| format!("{config:?}")));
}

fn check(parsed: std::result::Result<String, onlyonce::Error>) {
    if let Err(error) = parsed {
        assert_eq!(
            (error.kind(), error.is_retryable()),
            (ErrorKind::Config, false),
            "{error}"
        );
        assert!(!error.to_string().is_empty());
    }
}

const SECRET: &str = "s3cr3t";

/// A URL with a password, well written or not: nothing that is printed repeats it.
pub fn secrets(data: &[u8]) {
    let Ok(url) = with_password(&mut Unstructured::new(data)) else {
        return;
    };
    let mut shown = String::new();
    let made = [
        RUNTIME.block_on(onlyonce::source(&url)).map(drop),
        RUNTIME.block_on(onlyonce::sink(&url)).map(drop),
        RUNTIME.block_on(onlyonce::store(&url)).map(drop),
        url.parse::<Sqlite>().map(drop),
    ];
    for made in made {
        let _ = write!(shown, "{made:?} ");
        if let Err(error) = made {
            let _ = write!(shown, "{error} ");
        }
    }
    match url.parse::<Rabbit>() {
        Ok(config) => {
            let _ = write!(shown, "{config:?} {} ", config.endpoint());
            let (source, sink) = (RabbitSource::new(config.clone()), RabbitSink::new(config));
            let _ = write!(shown, "{source:?} {sink:?}");
        }
        Err(error) => {
            let _ = write!(shown, "{error} {error:?}");
        }
    }
    match url.parse::<Sqs>() {
        Ok(config) => {
            let _ = write!(shown, "{config:?}");
            let (source, sink) = (SqsSource::new(config.clone()), SqsSink::new(config));
            let _ = write!(shown, "{source:?} {sink:?}");
        }
        Err(error) => {
            let _ = write!(shown, "{error} {error:?}");
        }
    }
    match url.parse::<PubSub>() {
        Ok(config) => {
            let _ = write!(shown, "{config:?}");
            let (source, sink) = (PubSubSource::new(config.clone()), PubSubSink::new(config));
            let _ = write!(shown, "{source:?} {sink:?}");
        }
        Err(error) => {
            let _ = write!(shown, "{error} {error:?}");
        }
    }
    assert!(!shown.contains(SECRET), "{url} gives {shown}");
}

fn with_password(input: &mut Unstructured<'_>) -> Result<String> {
    let scheme = *input.choose(&[
        "amqp", "amqps", "amqpz", "https", "pubsub", "redis", "sqlite", "sqs",
    ])?;
    let user: &str = input.choose(&["", "u", "a%40b"])?;
    let before = around(input)?;
    let after = around(input)?;
    let rest = input.arbitrary::<&str>()?;
    let rest = if rest.contains(SECRET) { "" } else { rest };
    Ok(format!(
        "{scheme}://{user}:{before}{SECRET}{after}@host{rest}"
    ))
}

/// Another part of the password. Not with an `@`: what stands before the last one is the password, and what stands
/// before another could as well be a host.
fn around(input: &mut Unstructured<'_>) -> Result<String> {
    let text = input.arbitrary::<&str>()?;
    Ok(text.chars().filter(|c| *c != '@').take(8).collect())
}
