//! `docs/troubleshooting.md`: each of its commands, run where a test has planted the fault.

use std::{fs, path::Path};

use xtask::progress::wait_for;

use crate::world::{SOON, World};

const PAGE: &str = include_str!("../flannel-agent/docs/troubleshooting.md");

/// A row of the page.
struct Row {
    command: String,
    /// What is in the output, in this order.
    shown: Vec<String>,
    /// The whole cell.
    cell: String,
}

fn rows() -> Vec<Row> {
    let cells = PAGE.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let row = |(command, rest): (&str, &str)| {
        let cell = rest.split(" | ").next()?;
        let shown = cell.strip_prefix('`')?.strip_suffix('`')?.split("...").map(|part| part.trim().to_owned());
        Some(Row { command: command.to_owned(), shown: shown.collect(), cell: cell.to_owned() })
    };
    cells.map(|cells| row(cells).unwrap_or_else(|| panic!("not a row: {cells:?}"))).collect()
}

/// The one row whose output has this in it.
fn row(key: &str) -> Row {
    let mut found: Vec<_> = rows().into_iter().filter(|row| row.cell.contains(key)).collect();
    assert_eq!(found.len(), 1, "rows with {key:?}");
    found.remove(0)
}

impl World {
    /// Runs the command of the row that shows `key`, and waits until it shows what the page says; with other addresses than the
    /// page's.
    pub fn assert_shown(&self, host: usize, key: &str, addresses: &[(&str, &str)]) {
        self.assert_shown_by(key, addresses, || self.agent_on(host));
    }

    /// The same by an agent that is started in some way.
    pub fn assert_shown_by(&self, key: &str, addresses: &[(&str, &str)], agent: impl Fn() -> std::process::Command) {
        let Row { command, shown, .. } = row(key);
        let own = |text: &str| addresses.iter().fold(text.to_owned(), |text, (page, own)| text.replace(page, own));
        let command = own(&command);
        let arguments = command.strip_prefix("flannel-agent ").unwrap_or_else(|| panic!("{command}")).split(' ');
        let arguments: Vec<_> = arguments.collect();
        let mut text = String::new();
        let waited = wait_for("what the page says", 2 * SOON, || {
            let output = agent().args(&arguments).output().unwrap();
            text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            // In tables, words are further apart.
            let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
            let mut rest = words.as_str();
            shown.iter().all(|part| match rest.split_once(own(part).as_str()) {
                Some((_, behind)) => {
                    rest = behind;
                    true
                }
                None => false,
            })
        });
        assert!(waited.is_ok(), "{command}: {shown:?} with {addresses:?} is not in\n{text}");
    }
}

/// The key of each call in a source.
fn keys(source: &str) -> impl Iterator<Item = &str> {
    let calls = source.split(".assert_shown").skip(1);
    calls.filter_map(|call| call.split_once('"')?.1.split('"').next())
}

#[test]
fn each_row_of_the_page_is_shown_by_a_test() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = fs::read_dir(folder).unwrap().flatten().filter(|entry| entry.file_name() != "troubleshooting.rs");
    let sources: Vec<_> = sources.filter_map(|entry| fs::read_to_string(entry.path()).ok()).collect();
    let keys: Vec<_> = sources.iter().flat_map(|source| keys(source)).collect();
    for Row { cell, command, .. } in rows() {
        assert!(keys.iter().any(|key| cell.contains(key)), "no test shows {cell} by {command}");
    }
    keys.iter().for_each(|key| drop(row(key)));
}
