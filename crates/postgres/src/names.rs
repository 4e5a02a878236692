use std::fmt::Write as _;

/// The names of the store's tables and functions, as they stand in SQL: always with their schema, whatever `search_path` is.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    schema: String,
    prefix: String,
}

impl Names {
    pub(crate) fn new(schema: &str, prefix: &str) -> Self {
        Self {
            schema: format!("\"{schema}\""),
            prefix: prefix.to_owned(),
        }
    }

    /// The schema, quoted.
    pub(crate) fn schema(&self) -> &str {
        &self.schema
    }

    /// A table, a sequence or a function.
    pub(crate) fn of(&self, name: &str) -> String {
        format!("{}.{}{name}", self.schema, self.prefix)
    }

    /// The number of the locks that are this store's: the same in all processes.
    pub(crate) fn lock(&self) -> i32 {
        // FNV-1a: it only has to differ between stores in one database.
        let text = self.of("");
        let hash = text.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        hash.cast_signed()
    }

    /// The text with `{name}` replaced by each name, and those of numbers by the numbers.
    pub(crate) fn in_text(&self, text: &str, numbers: &[(&str, i64)]) -> String {
        let mut parts = text.split('{');
        let mut filled = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let (name, rest) = part.split_once('}').unwrap_or((part, ""));
            match numbers.iter().find(|(number, _)| *number == name) {
                Some((_, number)) => write!(filled, "{number}").unwrap_or_default(),
                None => filled.push_str(&self.of(name)),
            }
            filled.push_str(rest);
        }
        filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_schema_and_prefix() {
        let names = Names::new("my own", "dedup_");
        let text = names.in_text("SELECT {n} FROM {claim}, {record}", &[("n", 3)]);
        assert_eq!(
            text,
            r#"SELECT 3 FROM "my own".dedup_claim, "my own".dedup_record"#
        );
        assert_ne!(names.lock(), Names::new("public", "dedup_").lock());
    }
}
