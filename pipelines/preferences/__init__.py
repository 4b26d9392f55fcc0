"""Candidates, ranking, pairs and rounds of AVP-RPO."""
