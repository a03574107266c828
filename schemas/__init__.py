"""Contracts: what crosses a process. Pure pydantic; knows no torch, no Ray and no Redis client."""
