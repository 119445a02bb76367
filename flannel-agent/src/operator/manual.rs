//! `flannel-agent completions` and `flannel-agent man`, from the definition of the command line.

use std::{fs, io, path::Path};

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::OperatorError;
use crate::cli::Cli;

const NAME: &str = "flannel-agent";

/// Prints what a shell completes command lines by.
pub fn print_completions(shell: Shell) {
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut io::stdout());
}

/// Prints the manual page, or writes one for each command into a directory, which is made where it is missing.
///
/// # Errors
/// [`OperatorError::Manual`].
pub fn manual(directory: Option<&Path>) -> Result<(), OperatorError> {
    let result = match directory {
        None => clap_mangen::Man::new(Cli::command()).render(&mut io::stdout()),
        Some(directory) => {
            fs::create_dir_all(directory).and_then(|()| clap_mangen::generate_to(Cli::command(), directory))
        }
    };
    result.map_err(OperatorError::Manual)
}
