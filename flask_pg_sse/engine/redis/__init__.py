"""The engine on Redis: pub/sub, as the older relay has it. Nothing imports it unless it is used."""
