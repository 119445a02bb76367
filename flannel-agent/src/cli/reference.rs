//! `docs/configuration.md`: every flag, variable and key, from the definitions that the agent itself goes by.

use std::{fmt::Write as _, fs, path::Path};

use clap::{Arg, ArgAction, Command, CommandFactory as _};

use super::{Cli, arguments};
use crate::config::{BACKEND_KEYS, KEYS, Key};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
/// Set to anything, it has the test write the file.
const REGENERATE: &str = "REGENERATE_DOCS";

/// Variables beside those of the flags.
const VARIABLES: [(&str, &str); 9] = [
    ("NODE_NAME", "with `--kube-subnet-mgr`: the node that this host is"),
    (
        "POD_NAME, POD_NAMESPACE",
        "with `--kube-subnet-mgr` and without `NODE_NAME`: the agent's own pod, whose node is taken",
    ),
    (
        "KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT",
        "set by Kubernetes in each pod: the API server, where neither `--kube-api-url` nor `--kubeconfig-file` names it",
    ),
    ("NOTIFY_SOCKET", "set by systemd for units of `Type=notify`: where `READY=1` and `WATCHDOG=1` go"),
    ("WATCHDOG_USEC", "set by systemd where the unit has `WatchdogSec=`"),
    ("JOURNAL_STREAM", "set by systemd: where stderr is the journal, lines of the log begin with their priority"),
    ("PATH", "where `nft` and iptables are looked for, before `/usr/sbin` and the like"),
    ("EVENT_QUEUE_DEPTH", "flannel's; without effect"),
    (
        "CNI_COMMAND, CNI_CONTAINERID, ...",
        "of the CNI plugin `flannel`, set by the container runtime (CNI specification)",
    ),
];

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

fn code(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("`{}`", cell(text)) }
}

/// A flag as it is written, with what stands for its value.
fn written(flag: &Arg) -> String {
    // Of a switch the value is optional.
    let value = match flag.get_value_names() {
        Some(names) if flag.get_action().takes_values() && !flag.is_require_equals_set() => {
            format!(" {}", names.join(" "))
        }
        _ => String::new(),
    };
    let names = [flag.get_short().map(|short| format!("-{short}")), flag.get_long().map(|long| format!("--{long}"))];
    format!("{}{value}", names.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

/// Its help, and the values that it takes where these are listed.
fn description(flag: &Arg) -> String {
    let help = cell(&flag.get_help().map(ToString::to_string).unwrap_or_default());
    let repeated = if matches!(flag.get_action(), ArgAction::Append) && !help.contains("repeated") {
        "; may be repeated"
    } else {
        ""
    };
    let values: Vec<_> = flag
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| format!("`{}`", value.get_name()))
        .collect();
    if values.is_empty() || !flag.get_action().takes_values() {
        format!("{help}{repeated}")
    } else {
        format!("{help} ({}){repeated}", values.join(", "))
    }
}

fn default(flag: &Arg) -> String {
    let values: Vec<_> = flag.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if flag.get_action().takes_values() { code(&values.join(",")) } else { String::new() }
}

/// The daemon's flags, by heading.
fn flags(text: &mut String, definition: &Command) {
    let known: Vec<_> =
        definition.get_arguments().filter(|flag| flag.get_long().is_some_and(|name| name != "help")).collect();
    let mut headings: Vec<Option<&str>> = Vec::new();
    for flag in &known {
        if !headings.contains(&flag.get_help_heading()) {
            headings.push(flag.get_help_heading());
        }
    }
    for heading in headings {
        let _ = write!(
            text,
            "### {}\n\n| flag | variable | default | |\n|---|---|---|---|\n",
            heading.unwrap_or("The daemon")
        );
        for flag in known.iter().filter(|flag| flag.get_help_heading() == heading) {
            let name = flag.get_long().unwrap_or_default();
            let variable = if name == "version" { String::new() } else { code(&arguments::variable(name)) };
            let _ =
                writeln!(text, "| {} | {variable} | {} | {} |", code(&written(flag)), default(flag), description(flag));
        }
        text.push('\n');
    }
}

/// The flags and arguments of each command and of what is below it.
fn commands(text: &mut String, command: &Command, name: &str) {
    for command in command.get_subcommands().filter(|command| command.get_name() != "help" && !command.is_hide_set()) {
        let name = format!("{name} {}", command.get_name());
        let own = command.get_arguments().filter(|flag| flag.get_id() != "help" && !flag.is_global_set());
        for flag in own {
            let written = if flag.is_positional() {
                flag.get_value_names().map(|names| names.join(" ")).unwrap_or_default()
            } else {
                written(flag)
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} |",
                code(name.trim_start()),
                code(&written),
                default(flag),
                description(flag)
            );
        }
        commands(text, command, &name);
    }
}

fn keys(text: &mut String, keys: &[Key]) {
    text.push_str("| key | default | |\n|---|---|---|\n");
    for Key { name, default, description } in keys {
        let _ = writeln!(text, "| `{name}` | {} | {} |", cell(default), cell(description));
    }
    text.push('\n');
}

fn reference() -> String {
    let definition = Cli::command();
    let mut text = String::from(
        "<!-- Generated from the agent's definitions by a test: cli/reference.rs. -->\n\n# Configuration\n\n\
         Every flag, variable and key. Flags have one dash or two; a switch (shown without a value) is `true` when it stands alone, and\n\
         otherwise has its value behind `=`. A flag overrides its variable; of a flag that is given twice the last counts, unless it may be\n\
         repeated. An empty text means that nothing was given. `flannel-agent config show --origin` prints what is in effect.\n\n## Flags\n\n",
    );
    flags(&mut text, &definition);
    text.push_str("## Further variables\n\n| variable | |\n|---|---|\n");
    for (names, description) in VARIABLES {
        let names: Vec<_> =
            names.split(", ").map(|name| if name == "..." { name.to_owned() } else { code(name) }).collect();
        let _ = writeln!(text, "| {} | {description} |", names.join(", "));
    }
    text.push_str(
        "\n## The network config\n\nA JSON object: in etcd below `--etcd-prefix` as `config`, with Kubernetes in the file of `--net-config-path`. Letters have no\n\
         case. Unknown keys are warned about. `flannel-agent config validate FILE` checks one. [Backends](backends.md) explains the choice.\n\n",
    );
    keys(&mut text, &KEYS);
    text.push_str("### Backend\n\n");
    keys(&mut text, &BACKEND_KEYS);
    text.push_str("## Flags of the commands\n\n| command | flag or argument | default | |\n|---|---|---|---|\n");
    commands(&mut text, &definition, "");
    text
}

#[test]
fn the_documentation_of_flags_variables_and_keys_is_current() {
    let reference = reference();
    if std::env::var_os(REGENERATE).is_some() {
        fs::write(FILE, &reference).expect("the file is written");
    }
    let documented = fs::read_to_string(Path::new(FILE)).unwrap_or_default();
    let differing =
        reference.lines().zip(documented.lines().chain(std::iter::repeat(""))).find(|(now, then)| now != then);
    assert!(
        reference == documented,
        "docs/configuration.md is not current, first at {differing:?}; write it again with: \
         {REGENERATE}=1 cargo test -p flannel-agent --lib the_documentation_of_flags"
    );
}
