let
  double = s: n: if n == 0 then s else double (s + s) (n - 1);
in
builtins.toFile "large" (double "0123456789abcdef" 17)
