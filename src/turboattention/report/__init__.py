"""Result objects to terminal, plots and HTML; nothing is measured or computed here."""
