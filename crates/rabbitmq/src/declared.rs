//! How a queue was declared. AMQP has no question for that, but a declaration with another argument is refused with the
//! present value, one argument at a time (<https://www.rabbitmq.com/docs/queues#property-equivalence>).

use std::collections::BTreeMap;

use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};

use crate::Config;
use crate::connection::{Link, answer};
use crate::error::Fault;

const TYPE: &str = "x-queue-type";
const LIMIT: &str = "x-delivery-limit";
/// What is asked for. A broker reports some arguments before the type and some after it.
const ASKED: [&str; 3] = [TYPE, "x-single-active-consumer", LIMIT];
/// None of the three takes this value, so nothing is ever declared by asking.
const NO_VALUE: &str = "onlyonce-asks";
/// At most this number of questions are asked: more than there are arguments.
const MOST: usize = 40;

/// What is known of a queue's declaration. Policies do not show.
#[derive(Clone, Debug, Default)]
pub(crate) struct Declared {
    /// Arguments and their values, as the broker spells them.
    arguments: BTreeMap<String, String>,
    durable: bool,
}

impl Declared {
    /// Asks; `None` where the permission `configure` is missing, or the broker's answer is not understood.
    pub(crate) async fn ask(
        config: &Config,
        link: &Link,
        queue: &str,
    ) -> Result<Option<Self>, Fault> {
        let mut question = Question::default();
        for _ in 0..MOST {
            if question.asked.is_empty() {
                return Ok(Some(question.declared));
            }
            let told = question.put(config, link, queue).await?;
            let told = told.as_deref().and_then(Told::read);
            if !told.is_some_and(|told| question.note(told)) {
                break;
            }
        }
        Ok(None)
    }

    pub(crate) fn queue_type(&self) -> &str {
        self.text(TYPE).unwrap_or("classic")
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.arguments.get(name).map(String::as_str)
    }

    pub(crate) fn number(&self, name: &str) -> Option<i64> {
        self.text(name)?.parse().ok()
    }

    pub(crate) fn is_durable(&self) -> bool {
        self.durable
    }

    pub(crate) fn is(&self, name: &str) -> bool {
        self.text(name) == Some("true")
    }

    /// For people.
    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        let durable = ("durable".to_owned(), self.durable.to_string());
        let arguments = self.arguments.clone().into_iter();
        [durable].into_iter().chain(arguments).collect()
    }
}

/// The declaration that comes nearer to the queue's own with every answer. As long as one of those asked for is open, it
/// cannot succeed.
struct Question {
    asked: Vec<&'static str>,
    options: QueueDeclareOptions,
    arguments: FieldTable,
    declared: Declared,
}

impl Default for Question {
    fn default() -> Self {
        let mut arguments = FieldTable::default();
        for name in ASKED {
            arguments.insert(name.into(), AMQPValue::LongString(NO_VALUE.into()));
        }
        let durable = true;
        Self {
            asked: ASKED.into(),
            options: QueueDeclareOptions {
                durable,
                ..QueueDeclareOptions::default()
            },
            arguments,
            declared: Declared {
                arguments: BTreeMap::new(),
                durable,
            },
        }
    }
}

impl Question {
    /// The text of the refusal; on a channel of its own, since a refusal ends it.
    async fn put(
        &self,
        config: &Config,
        link: &Link,
        queue: &str,
    ) -> Result<Option<String>, Fault> {
        let refused = answer(config.timeout, async {
            let channel = link.connection.create_channel().await?;
            let declare = channel.queue_declare(queue.into(), self.options, self.arguments.clone());
            declare.await
        });
        match refused.await {
            Ok(_) => Ok(None),
            Err(fault) => match fault.exception() {
                Some((403 | 405, _)) => Ok(None),
                Some((406, text)) => Ok(Some(text.to_owned())),
                _ => Err(fault),
            },
        }
    }

    /// Takes an answer into the next question; false if there can be none.
    fn note(&mut self, told: Told<'_>) -> bool {
        let was_asked = self.is_settled(told.name);
        let flag = told.value == Some("true");
        match told.name {
            "durable" => {
                self.options.durable = flag;
                self.declared.durable = flag;
                return true;
            }
            "auto_delete" => {
                self.options.auto_delete = flag;
                return true;
            }
            "exclusive" => {
                self.options.exclusive = flag;
                return true;
            }
            _ => {}
        }
        match told.value {
            _ if told.name != TYPE => {}
            Some("quorum") => {}
            // It has no delivery limit.
            Some("classic") | None => {
                self.is_settled(LIMIT);
                self.unset(LIMIT);
            }
            // Nor is the rest of any use.
            Some(_) => self.asked.clear(),
        }
        match told.argument() {
            Some(argument) => {
                self.arguments.insert(told.name.into(), argument);
                let value = told.value.unwrap_or_default();
                let before = self
                    .declared
                    .arguments
                    .insert(told.name.into(), value.into());
                // Told twice, it was not understood.
                before.is_none()
            }
            None => {
                self.unset(told.name);
                was_asked
            }
        }
    }

    /// Whether this was asked for, which it is no more.
    fn is_settled(&mut self, name: &str) -> bool {
        let before = self.asked.len();
        self.asked.retain(|asked| *asked != name);
        self.asked.len() < before
    }

    fn unset(&mut self, name: &str) {
        let kept = self.arguments.inner().iter();
        let kept = kept.filter(|(it, _)| it.as_str() != name);
        self.arguments = kept
            .map(|(it, value)| (it.clone(), value.clone()))
            .collect::<BTreeMap<_, _>>()
            .into();
    }
}

/// One answer: `… inequivalent arg 'NAME' for queue 'Q' in vhost 'V': received X but current is Y`, where Y is `none`,
/// `the value 'VALUE' of type 'TYPE'` or `'VALUE'`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Told<'a> {
    name: &'a str,
    value: Option<&'a str>,
    kind: Option<&'a str>,
}

impl<'a> Told<'a> {
    /// The value as it has to be sent; `None` if there is none, or it is of a kind that cannot be.
    fn argument(self) -> Option<AMQPValue> {
        let value = self.value?;
        let number = || value.parse().ok().map(AMQPValue::LongLongInt);
        let text = || AMQPValue::LongString(value.into());
        match (self.kind, value) {
            // Where another value was sent, the kind is not told.
            (Some("bool") | None, "true" | "false") => Some(AMQPValue::Boolean(value == "true")),
            (None, _) => number().or_else(|| Some(text())),
            (Some("longstr"), _) => Some(text()),
            (Some(_), _) => number(),
        }
    }

    fn read(text: &'a str) -> Option<Self> {
        let (_, rest) = text.split_once("inequivalent arg '")?;
        let (name, rest) = rest.split_once('\'')?;
        // What was sent is told before, and has no such words in it.
        let (_, current) = rest.rsplit_once(" but current is ")?;
        if current == "none" {
            let (value, kind) = (None, None);
            return Some(Self { name, value, kind });
        }
        let (_, value) = current.split_once('\'')?;
        let (value, kind) = match value.rsplit_once("' of type '") {
            Some((value, kind)) => (value, kind.strip_suffix('\'')),
            None => (value.strip_suffix('\'')?, None),
        };
        let value = Some(value);
        Some(Self { name, value, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_refusal_tells_is_read() {
        let text = |current: &str| {
            format!(
                "PRECONDITION_FAILED - inequivalent arg 'x' for queue 'it's' in vhost '/': received the value 'onlyonce-asks' of type 'longstr' but current is {current}"
            )
        };
        for (current, value, kind) in [
            ("none", None, None),
            (
                "the value 'quorum' of type 'longstr'",
                Some("quorum"),
                Some("longstr"),
            ),
            (
                "the value '-1' of type 'signedint'",
                Some("-1"),
                Some("signedint"),
            ),
            (
                "the value 'o'clock' of type 'longstr'",
                Some("o'clock"),
                Some("longstr"),
            ),
            ("'true'", Some("true"), None),
        ] {
            let told = Told {
                name: "x",
                value,
                kind,
            };
            assert_eq!(Told::read(&text(current)), Some(told), "{current}");
        }
        for strange in [
            "",
            "NOT_FOUND - no queue 'q' in vhost '/'",
            "inequivalent arg 'x",
        ] {
            assert_eq!(Told::read(strange), None);
        }
    }
}
