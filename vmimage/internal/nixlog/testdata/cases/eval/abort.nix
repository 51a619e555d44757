{ value = abort "not like this"; }
