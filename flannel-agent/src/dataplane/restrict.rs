//! Carrying out a [`Plan`]: which programs take what to the stack. A program that lets nothing bypass the stack is the same one
//! with other constants, and takes its place in one step.

use flannel_common::maps::Config;

use super::{Dataplane, DataplaneError, Hook, Parameters, held::Place};
use crate::bypass::Plan;

/// Programs with constants of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Variant {
    /// Nothing bypasses the stack.
    is_restricted: bool,
    /// Of [`Config`].
    flags: u32,
    /// Bytes of the link-layer header in front of what comes in, where it is not as the external interface has it.
    link_header_len: Option<u16>,
}

impl Dataplane {
    /// Has the programs do as the plan says, which may be called for again at any time: those that are attached are swapped
    /// where it wants others, and whatever is attached later follows it. Called before anything is attached, it keeps the
    /// bypass closed that an agent before this one had closed.
    ///
    /// # Errors
    /// [`DataplaneError`] of the last that failed; the others are as the plan says, and the next call tries again.
    pub fn restrict(&mut self, plan: &Plan) -> Result<(), DataplaneError> {
        self.plan.clone_from(plan);
        let stale: Vec<_> = self.held.values().map(|held| (held.place, held.ifindex, held.variant)).collect();
        let mut closed = Vec::new();
        // Before programs that make notes come back.
        let mut result = self.excluded.bring_to(plan);
        for (place, ifindex, variant) in stale {
            let wanted = self.wanted(place, ifindex);
            if wanted == variant {
                continue;
            }
            match self.attach_again(place, ifindex) {
                Ok(()) if place.is_of_pod() && wanted.is_restricted => closed.push(ifindex),
                Ok(()) => {}
                Err(error) => {
                    if place.is_of_pod() {
                        // It is attached anew with the other pods.
                        self.pods.remove(&ifindex);
                    }
                    result = Err(error);
                }
            }
        }
        // What is noted of them would be put past their programs.
        if !closed.is_empty() {
            result = result.and(self.forgetter.forget_veths(&closed).map(drop));
        }
        result
    }

    /// What the plan wants in a place.
    pub(super) fn wanted(&self, place: Place, ifindex: u32) -> Variant {
        let Plan { everything, overlay_queue, overlay_capture, external_interface, underlay_links, pods, .. } =
            &self.plan;
        let Plan { left_in_tunnel, xdp_passes, .. } = self.plan;
        let is_restricted = match place {
            Place::Tc(Hook::FromPod | Hook::ToPod) => *everything || pods.contains(&ifindex),
            Place::Tc(Hook::FromUnderlay) => *everything || *external_interface || underlay_links.contains(&ifindex),
            Place::Tc(Hook::ToOverlay | Hook::FromOverlay | Hook::ToUnderlay) => *everything,
            Place::Xdp(_) => false,
        };
        let flag = |is_set: bool, flag| if is_set { flag } else { 0 };
        let flags = match place {
            Place::Tc(Hook::ToOverlay) => flag(*overlay_queue, Config::QUEUED) | flag(*overlay_capture, Config::SHOWN),
            // Where nothing bypasses the stack, nothing is taken out of the tunnel either.
            Place::Tc(Hook::FromUnderlay) => flag(left_in_tunnel && !is_restricted, Config::LEFT_IN_TUNNEL),
            Place::Tc(_) => 0,
            Place::Xdp(_) => flag(*external_interface || xdp_passes || left_in_tunnel, Config::LEFT_IN_TUNNEL),
        };
        let link_header_len = match place {
            Place::Tc(Hook::FromUnderlay) => self.underlay.get(&ifindex).copied(),
            Place::Tc(_) | Place::Xdp(_) => None,
        };
        let as_loaded = self.parameters.config.underlay_header_len;
        Variant { is_restricted, flags, link_header_len: link_header_len.filter(|len| *len != as_loaded) }
    }

    /// Makes programs of a variant, where they are others than the ones that are loaded at once.
    pub(super) fn load_variant(&mut self, variant: Variant) -> Result<(), DataplaneError> {
        if variant == Variant::default() || self.variants.contains_key(&variant) {
            return Ok(());
        }
        // With the maps of the others, which are found by their pins.
        self.repair_pins()?;
        let Parameters { mut config, .. } = self.parameters;
        config.flags |= variant.flags;
        config.underlay_header_len = variant.link_header_len.unwrap_or(config.underlay_header_len);
        if variant.is_restricted {
            config.bypass_time = 0;
        }
        let ebpf = Parameters { config, ..self.parameters }.load(&self.pins, &[])?;
        self.variants.insert(variant, ebpf);
        Ok(())
    }
}

impl Place {
    fn is_of_pod(self) -> bool {
        matches!(self, Self::Tc(hook) if Hook::OF_PODS.contains(&hook))
    }
}
