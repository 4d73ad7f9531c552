"""The command line: reads options, calls one verb, prints. No rule of the product lives here."""
