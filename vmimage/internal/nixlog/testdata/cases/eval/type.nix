{ value = "port " + 22; }
