//! What a command printed, without what differs between any two clusters.

use std::fmt;

use crate::judges::group::Group;

/// Ids are printed as hexadecimal numbers of at least so many digits, or decimal ones of more.
const ID_DIGITS_MIN: usize = 12;

/// Where an id stands in a sentence, it is padded to so many digits.
const ID_WIDTH: usize = 16;

/// What the line of `member add` starts with that lists all members.
const MEMBERS_START: &str = "ETCD_INITIAL_CLUSTER=\"";

/// Output of one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    output: String,
    errors: String,
    code: Option<i32>,
    id: IgnoredId,
}

/// Compares equal to every other.
#[derive(Clone, Debug, Default)]
struct IgnoredId(Option<String>);

impl PartialEq for IgnoredId {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for IgnoredId {}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.output, self.errors)?;
        writeln!(f, "exit code {:?}", self.code)
    }
}

impl Shown {
    pub fn new(group: &Group, output: &str, errors: &str, code: Option<i32>) -> Self {
        // Beside the message there are log lines, with times in them.
        let errors: String = errors
            .lines()
            .filter(|line| line.starts_with("Error:"))
            .map(|line| format!("{line}\n"))
            .collect();
        let id = words(output).find(|word| is_id(word)).map(str::to_owned);
        Self {
            output: settled(group, output),
            errors: settled(group, &errors),
            code,
            id: IgnoredId(id),
        }
    }

    /// The same with all numbers replaced.
    pub fn form(self) -> Self {
        let mut output = String::new();
        for symbol in self.output.chars() {
            let digit = symbol.is_ascii_digit() || symbol == '.';
            match (digit, output.ends_with('#')) {
                (true, false) => output.push('#'),
                (true, true) => {}
                (false, _) => output.push(symbol),
            }
        }
        Self { output, ..self }
    }

    pub fn first_id(&self) -> Option<&str> {
        self.id.0.as_deref()
    }

    pub fn lines(&self) -> usize {
        self.output.lines().count()
    }

    /// gRPC's answer for calls that a server does not have.
    pub fn is_unimplemented(&self) -> bool {
        self.errors.contains("code = Unimplemented") || self.errors.contains("unknown service")
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|symbol: char| !symbol.is_ascii_alphanumeric())
}

fn is_id(word: &str) -> bool {
    word.len() >= ID_DIGITS_MIN && word.chars().all(|symbol| symbol.is_ascii_hexdigit())
}

fn settled(group: &Group, text: &str) -> String {
    let mut text = text.to_owned();
    for member in group.members() {
        text = text
            .replace(&member.address().to_string(), "ADDRESS")
            .replace(member.name(), "NAME");
    }
    let mut result = String::new();
    for line in text.lines() {
        // Times that something took.
        let line = line.split("took").next().unwrap_or_default();
        let line = without_widths(&in_order_of_name(line));
        let mut rest = line.as_str();
        while !rest.is_empty() {
            let end = rest
                .find(|symbol: char| !symbol.is_ascii_alphanumeric())
                .unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            if is_id(word) {
                without_padding(&mut result, word);
                result.push_str("ID");
            } else {
                result.push_str(word);
            }
            let next = after.chars().next().map_or(0, char::len_utf8);
            let (symbol, after) = after.split_at(next);
            result.push_str(symbol);
            rest = after;
        }
        result.push('\n');
    }
    without_terms(&result)
}

/// Takes away the blanks that a sentence puts before an id that is shorter than most.
fn without_padding(before: &mut String, id: &str) {
    for _ in id.len()..ID_WIDTH {
        if before.ends_with("  ") {
            before.pop();
        }
    }
}

/// Columns of a table are as wide as the longest id or address in them, which are random.
fn without_widths(line: &str) -> String {
    if !line.starts_with(['┌', '├', '└', '│']) {
        return line.to_owned();
    }
    let mut result = String::new();
    for symbol in line.chars() {
        if !(matches!(symbol, ' ' | '─') && result.ends_with(symbol)) {
            result.push(symbol);
        }
    }
    result
}

/// Members are listed by their ids, which are random.
fn in_order_of_name(line: &str) -> String {
    let quoted = line
        .strip_prefix(MEMBERS_START)
        .and_then(|rest| rest.strip_suffix('"'));
    let Some(members) = quoted else {
        return line.to_owned();
    };
    let mut members: Vec<&str> = members.split(',').collect();
    members.sort_unstable();
    format!("{MEMBERS_START}{}\"", members.join(","))
}

/// Raft terms are not those of the other cluster.
fn without_terms(text: &str) -> String {
    let mut result = text.to_owned();
    for name in ["\"raft_term\":", "\"RaftTerm\" : "] {
        let mut pieces = result.split(name);
        let mut joined = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            joined.push_str(name);
            joined.push_str("TERM");
            joined.push_str(piece.trim_start_matches(|symbol: char| symbol.is_ascii_digit()));
        }
        result = joined;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_and_ids_are_set_aside() {
        assert_eq!(
            without_terms("{\"raft_term\":12,\"x\":3}"),
            "{\"raft_term\":TERM,\"x\":3}"
        );
        assert!(is_id("694d9a3f8c2b1e00") && !is_id("2379") && !is_id("somethingelse"));
    }

    #[test]
    fn tables_are_compared_without_their_widths() {
        assert_eq!(without_widths("├────┼──┤"), "├─┼─┤");
        assert_eq!(without_widths("│   ID │ x  │"), "│ ID │ x │");
        assert_eq!(without_widths("  two  blanks"), "  two  blanks");
    }

    #[test]
    fn ids_in_sentences_are_compared_without_their_padding() {
        for (before, id) in [
            ("Member ", "694d9a3f8c2b1e00"),
            ("Member   ", "4d9a3f8c2b1e00"),
        ] {
            let mut before = before.to_owned();
            without_padding(&mut before, id);
            assert_eq!(before, "Member ");
        }
    }

    #[test]
    fn a_form_keeps_words_and_loses_numbers() {
        let shown = Shown {
            output: "size 12.5 MB of 7".to_owned(),
            errors: String::new(),
            code: Some(0),
            id: IgnoredId(None),
        };
        assert_eq!(shown.form().output, "size # MB of #");
    }
}
