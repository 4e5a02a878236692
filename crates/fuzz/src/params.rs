use std::time::Duration;

use onlyonce::driver::Params;
use url::Url;

/// A query of a URL: every parameter is read as it was given, or is an error.
pub fn params(data: &[u8]) {
    let Ok(query) = std::str::from_utf8(data) else {
        return;
    };
    let mut url = Url::parse("scheme:path").expect("a URL");
    url.set_query(Some(query));
    let Ok(mut params) = Params::of(&url) else {
        return;
    };
    let given: Vec<(String, String)> = url.query_pairs().into_owned().collect();
    let value = |name| {
        let mut found = given.iter().filter(|(given, _)| given == name);
        found.next().map(|(_, value)| value.clone())
    };
    match (params.duration("wait"), value("wait")) {
        (Ok(None), None) => {}
        (Ok(Some(read)), Some(text)) => assert_eq!(Some(read), duration(&text), "{text}"),
        (Err(_), Some(text)) => assert_eq!(duration(&text), None, "{text}"),
        other => panic!("{other:?}"),
    }
    match (params.parsed::<u16>("many", "a number"), value("many")) {
        (Ok(read), text) => assert_eq!(read, text.and_then(|text| text.parse().ok())),
        (Err(error), text) => {
            assert!(
                text.is_some_and(|text| text.parse::<u16>().is_err()),
                "{error}"
            );
        }
    }
    assert_eq!(params.text("name"), value("name"));
    let unknown = given
        .iter()
        .any(|(name, _)| !["wait", "many", "name"].contains(&name.as_str()));
    assert_eq!(params.finish().is_err(), unknown);
}

/// What is meant by a number with a unit, up to a century.
fn duration(text: &str) -> Option<Duration> {
    const CENTURY: u128 = 36_500 * 86_400_000;
    const UNITS: [(&str, u128); 5] = [
        ("ms", 1),
        ("s", 1_000),
        ("m", 60_000),
        ("h", 3_600_000),
        ("d", 86_400_000),
    ];
    UNITS.into_iter().find_map(|(unit, each)| {
        let digits = text.strip_suffix(unit)?;
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        let number: u64 = digits.parse().ok().filter(|_| plain)?;
        let millis = u128::from(number) * each;
        let short = millis <= CENTURY;
        short.then(|| Duration::from_millis(u64::try_from(millis).expect("a century is less")))
    })
}
