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

    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
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

    /// On which the relays are told of new messages.
    pub(crate) fn channel(&self) -> String {
        format!("onlyonce_{:x}", self.lock())
    }

    /// The text with each `{name}` replaced by what is given for it, or else by the full name.
    pub(crate) fn in_text(&self, text: &str, given: &[(&str, String)]) -> String {
        let mut parts = text.split('{');
        let mut filled = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let (name, rest) = part.split_once('}').unwrap_or((part, ""));
            match given.iter().find(|(known, _)| *known == name) {
                Some((_, value)) => filled.push_str(value),
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
        let text = names.in_text("SELECT {n} FROM {claim}, {record}", &[("n", "3".into())]);
        assert_eq!(
            text,
            r#"SELECT 3 FROM "my own".dedup_claim, "my own".dedup_record"#
        );
        assert_ne!(names.lock(), Names::new("public", "dedup_").lock());
    }
}
