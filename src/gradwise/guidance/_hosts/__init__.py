"""The places where a guidance works inside diffusers: its guider slot, and around a pipeline's network."""

from gradwise.base.checks import require_extra

require_extra("diffusers", "diffusers")
