"""Rewards of several weighted checks, some of them judged by a language model."""
