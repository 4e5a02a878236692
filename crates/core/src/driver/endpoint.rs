use url::{Host, Url};

use crate::Error;

/// Checks where requests are to go: `http://` or `https://` with a host and no credentials, like `example`.
///
/// # Errors
/// [`Config`](crate::ErrorKind::Config): it has another form. The text is not repeated: it may hold a secret.
pub fn check_endpoint(endpoint: &str, example: &str) -> Result<(), Error> {
    let fits = Url::parse(endpoint).is_ok_and(|url| {
        matches!(url.scheme(), "http" | "https") && url.has_host() && !has_credentials(&url)
    });
    match fits {
        true => Ok(()),
        false => Err(Error::config(format!(
            "`endpoint` must be a URL like {example}"
        ))),
    }
}

/// Whether the URL has a user or a password.
#[must_use]
pub fn has_credentials(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

/// The other machine to which this endpoint's requests go unencrypted, if they do.
#[must_use]
pub fn exposed_to(endpoint: &str) -> Option<String> {
    let url = Url::parse(endpoint).ok()?;
    let loopback = match url.host()? {
        Host::Domain(name) => name == "localhost" || name.ends_with(".localhost"),
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
    };
    let host = url.host_str()?.to_owned();
    (url.scheme() == "http" && !loopback).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_leaves_the_machine_unencrypted_is_exposed() {
        for endpoint in ["http://10.1.2.3:8085", "http://queue.example.com"] {
            assert!(exposed_to(endpoint).is_some(), "{endpoint}");
        }
        for endpoint in [
            "http://127.0.0.1:8085",
            "http://localhost:1",
            "http://s3.localhost:1",
            "http://[::1]:1",
            "https://queue.example.com",
        ] {
            assert_eq!(exposed_to(endpoint), None, "{endpoint}");
        }
    }

    #[test]
    fn an_endpoint_is_a_url_without_credentials() {
        let example = "http://127.0.0.1:4566";
        check_endpoint(example, example).unwrap();
        for endpoint in ["127.0.0.1:80", "ftp://h", "http://u:s3cr3t@h", ""] {
            let error = check_endpoint(endpoint, example).unwrap_err().to_string();
            assert!(
                error.contains(example) && !error.contains("s3cr3t"),
                "{error}"
            );
        }
    }
}
