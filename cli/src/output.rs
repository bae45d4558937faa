//! Tables, JSON and messages.

use std::io::{self, Write as _};

use anyhow::{Context, Result};
use serde::Serialize;

/// What stands in a cell without value.
pub const NONE: &str = "-";

/// Rows under a heading, columns two spaces apart.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(heading: &[&str]) -> Self {
        Self {
            rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        let or_none = |cell: String| {
            if cell.is_empty() {
                NONE.to_owned()
            } else {
                printable(&cell)
            }
        };
        self.rows.push(cells.into_iter().map(or_none).collect());
    }

    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Records of peers are not ours: what they say must not drive the terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character.is_control() {
                '\u{fffd}'
            } else {
                character
            }
        })
        .collect()
}

/// Prints to standard output. A reader that has gone away (`| head`) is no failure.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Prints a value as JSON.
pub fn json(value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Prints what is going on to standard error.
pub fn note(text: &str) {
    // There is nobody to tell when standard error is closed.
    let _ = writeln!(io::stderr(), "{}", printable(text));
}

/// Prints why the command failed to standard error.
pub fn error(text: &str) {
    note(&format!("clustermesh: {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_empty_cells_are_marked() {
        let mut table = Table::new(&["NAME", "ID"]);
        table.row(vec!["a-long-name".to_owned(), "1".to_owned()]);
        table.row(vec!["é".to_owned(), String::new()]);
        assert_eq!(
            table.render(),
            "NAME         ID\na-long-name  1\né            -\n"
        );
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let mut table = Table::new(&["NAME"]);
        table.row(vec!["a\u{1b}[31mb\n".to_owned()]);
        assert_eq!(table.render(), "NAME\na\u{fffd}[31mb\u{fffd}\n");
    }
}
