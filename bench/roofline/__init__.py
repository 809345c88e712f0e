"""The roofline model: operations and bytes of the work, peak rates of the machine, and the bound that follows."""
