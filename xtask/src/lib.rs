//! The project's commands, and the hosts in network namespaces that they and the tests are run on.
//!
//! # Layout
//!
//! * [`lab`] — an underlay, hosts, pods, a store; made of other people's tools
//! * [`transfer`] — bulk TCP between two of them
//! * [`package`] — packages that are unpacked and not installed
//! * [`variants`] — agents as a later version may be, to be upgraded to
//! * one module for each command
//!
//! It runs programs and depends on no other crate of the project, so that it builds on a machine that has nothing yet.

pub mod api_server;
pub mod bench;
pub mod chaos;
pub mod check;
pub mod dist;
pub mod fuzz;
pub mod lab;
pub mod package;
pub mod process;
pub mod progress;
pub mod run;
pub mod setup;
pub mod test;
pub mod transfer;
pub mod variants;
pub mod vm;
