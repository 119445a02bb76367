//! The CNI plugin's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    flannel_agent::cni::main()
}
