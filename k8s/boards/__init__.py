"""Grafana boards, made from code: what they ask is built from the metrics themselves."""
