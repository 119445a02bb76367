//! The host's connection tracking, where the bypass needs it.
//!
//! * `settings` — its patience with flows that it sees little of
//! * [`events`] — the end of connections
//! * [`helpers`] — whose flows it reads

pub mod events;
pub mod helpers;
mod settings;

pub use settings::{Liberal, changed, is_liberal, restore};
