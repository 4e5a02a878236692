use std::fmt::{self, Write as _};

/// Characters that are shown.
const MOST: usize = 1_000;

/// Somebody else's text on its way into a log line or an error: a single line, whatever it holds, of 1,000 characters at
/// most.
///
/// Control characters, line breaks and what changes the direction of writing are shown as Rust escapes them. Quotes and
/// backslashes stay, so that a text which was made printable before stays as it is.
///
/// ```
/// use onlyonce_core::driver::Printable;
///
/// assert_eq!(Printable("order-1\nERROR").to_string(), r"order-1\nERROR");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Printable<T>(pub T);

impl<T: fmt::Display> fmt::Display for Printable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = Line {
            to: f,
            left: MOST,
            cut: false,
        };
        write!(line, "{}", self.0)
    }
}

struct Line<'a, 'f> {
    to: &'a mut fmt::Formatter<'f>,
    left: usize,
    cut: bool,
}

impl fmt::Write for Line<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let escaped = c.escape_debug();
            let stays = matches!(c, '"' | '\'' | '\\');
            let length = if stays { 1 } else { escaped.len() };
            if self.cut {
                break;
            } else if length > self.left {
                self.cut = true;
                self.to.write_char('…')?;
            } else if stays {
                self.to.write_char(c)?;
            } else {
                write!(self.to, "{escaped}")?;
            }
            self.left = self.left.saturating_sub(length);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_one_line_and_has_an_end() {
        for (text, shown) in [
            ("order-17 für \"Ω\" in C:\\x", "order-17 für \"Ω\" in C:\\x"),
            (
                "a\r\nb\u{1b}[2J\0\u{202e}\u{2028}",
                r"a\r\nb\u{1b}[2J\0\u{202e}\u{2028}",
            ),
        ] {
            assert_eq!(Printable(text).to_string(), shown);
            assert_eq!(Printable(shown).to_string(), shown, "once is enough");
        }
        let whole = "ä".repeat(MOST);
        assert_eq!(Printable(&whole).to_string(), whole);
        let long = Printable("ä".repeat(1_000_000)).to_string();
        assert_eq!(long, format!("{whole}…"));
    }
}
