//! Errors as one line for people.

use std::error::Error;

/// An error with its causes, each said once: many an error says itself what caused it.
#[must_use]
pub fn said_once(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("open {0}")]
    struct Outer(&'static str, #[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("no such file")]
    struct Inner;

    #[test]
    fn a_cause_that_was_said_is_not_said_again() {
        assert_eq!(said_once(&Outer("a", Inner)), "open a: no such file");
        let repeats = Outer("a: no such file", Inner);
        assert_eq!(said_once(&repeats), "open a: no such file");
    }
}
