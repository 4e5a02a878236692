use std::str::FromStr;
use std::time::Duration;

use url::Url;

use crate::Error;

/// The parameters of a URL, taken out one by one; what is left at the end is an error. Every adapter reads its URL with
/// this, so that a misspelt parameter is never silently a default.
///
/// Its errors repeat no text of the URL but names of parameters and values of known ones. Of a password with a `?` in
/// it that is not percent-encoded, the rest would be read as parameters, up to its `@`: so that one is refused.
#[derive(Debug)]
pub struct Params {
    given: Vec<(String, String)>,
    known: Vec<&'static str>,
}

impl Params {
    /// The parameters of `url`.
    ///
    /// # Errors
    /// A parameter that is given twice; a `#`, behind which everything would be ignored; an `@` in the parameters.
    pub fn of(url: &Url) -> Result<Self, Error> {
        let at_in = |part: Option<&str>| part.is_some_and(|part| part.contains('@'));
        if at_in(url.query()) || at_in(url.fragment()) {
            return Err(Error::config(
                "the URL has an `@` behind a `?` or a `#`; write those of a password `%3f` and `%23`, and the `@` of a \
                 parameter `%40`",
            ));
        }
        if url.fragment().is_some() {
            return Err(Error::config("the URL has a `#` in it; write it `%23`"));
        }
        let mut given: Vec<(String, String)> = Vec::new();
        for (name, value) in url.query_pairs() {
            if given.iter().any(|(seen, _)| *seen == name) {
                return Err(Error::config(format!(
                    "the URL gives parameter {} twice; give it once",
                    shown(&name)
                )));
            }
            given.push((name.into_owned(), value.into_owned()));
        }
        Ok(Self {
            given,
            known: Vec::new(),
        })
    }

    /// The text of parameter `name`.
    pub fn text(&mut self, name: &'static str) -> Option<String> {
        self.known.push(name);
        let at = self.given.iter().position(|(given, _)| given == name)?;
        Some(self.given.swap_remove(at).1)
    }

    /// Parameter `name` as a number, a `true`/`false`, or whatever else parses; `form` says in the error what was
    /// expected.
    ///
    /// # Errors
    /// It is there and does not parse.
    pub fn parsed<T: FromStr>(
        &mut self,
        name: &'static str,
        form: &str,
    ) -> Result<Option<T>, Error> {
        self.text(name)
            .map(|text| {
                text.parse()
                    .map_err(|_| Error::config(format!("`{name}={text}` is not {form}")))
            })
            .transpose()
    }

    /// Parameter `name` as a duration: a whole number with `ms`, `s`, `m`, `h` or `d`, a century at most.
    ///
    /// # Errors
    /// It is there and has another form.
    pub fn duration(&mut self, name: &'static str) -> Result<Option<Duration>, Error> {
        self.text(name)
            .map(|text| {
                parse_duration(&text).ok_or_else(|| {
                    Error::config(format!(
                        "`{name}={text}` is not a duration; write it like 500ms, 30s, 5m, 2h or 7d, up to 36500d"
                    ))
                })
            })
            .transpose()
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// A parameter that nobody asked for; the error lists those that exist.
    pub fn finish(self) -> Result<(), Error> {
        match self.given.first() {
            None => Ok(()),
            Some((name, _)) => Err(Error::config(format!(
                "unknown parameter {} in the URL; known here: {}",
                shown(name),
                self.known.join(", ")
            ))),
        }
    }
}

/// A parameter's name, if it looks like one.
fn shown(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    match name.chars().all(plain) {
        true => format!("`{name}`"),
        false => "(its name is no word)".to_owned(),
    }
}

/// So that a moment that much later can still be told.
const LONGEST: Duration = Duration::from_secs(36_500 * 86_400);

fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    let seconds = |each: u64| number.checked_mul(each).map(Duration::from_secs);
    let duration = match &text[digits..] {
        "ms" => Some(Duration::from_millis(number)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3_600),
        "d" => seconds(86_400),
        _ => None,
    };
    duration.filter(|duration| *duration <= LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(query: &str) -> Params {
        Params::of(&Url::parse(&format!("x://h/?{query}")).unwrap()).unwrap()
    }

    #[test]
    fn unknown_parameters_are_named_with_the_known_ones() {
        let mut params = params("prefetsch=10");
        assert_eq!(params.text("prefetch"), None);
        let error = params.finish().unwrap_err().to_string();
        assert!(
            error.contains("prefetsch") && error.contains("known here: prefetch"),
            "{error}"
        );
    }

    #[test]
    fn durations_have_units_and_do_not_overflow() {
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("7d"), Some(Duration::from_secs(604_800)));
        assert_eq!(parse_duration("36500d"), Some(LONGEST));
        for bad in [
            "",
            "5",
            "s",
            "-1s",
            "1.5s",
            "99999999999999999999s",
            "18446744073709551615d",
            "36501d",
            "5 s",
        ] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
        assert!(params("wait=soon").duration("wait").is_err());
    }

    #[test]
    fn what_would_be_ignored_is_refused() {
        for url in ["x://h/?a=1&a=2", "x://h/?a=1#2", "x://h/#"] {
            assert!(Params::of(&Url::parse(url).unwrap()).is_err(), "{url}");
        }
    }

    #[test]
    fn a_password_that_became_a_parameter_is_not_repeated() {
        // Of `amqp://user:12?s3cr3t@host` and the like.
        for query in [
            "s3cr3t@host/",
            "s3cr3t=@host",
            "s3cr3t&a=@host",
            "a=s3cr3t&a@host",
            "s3cr3t&s3cr3t#@host",
            "s3cr3t@host&s3cr3t@host",
        ] {
            let url = Url::parse(&format!("x://user:12?{query}")).unwrap();
            let read = Params::of(&url).and_then(|mut params| {
                params.parsed::<u8>("a", "a number")?;
                params.finish()
            });
            let error = read.unwrap_err().to_string();
            assert!(!error.contains("s3cr3t"), "{error}");
        }
    }
}
