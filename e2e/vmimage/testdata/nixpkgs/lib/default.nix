# The little of nixpkgs' library that choosing an attribute needs.
rec {
  version = "26.05test";
  trivial.release = "26.05";
  optional = condition: value: if condition then [ value ] else [ ];
  splitString = separator: text: builtins.filter builtins.isString (builtins.split "[${separator}]" text);
  attrByPath =
    path: default: set:
    if path == [ ] then
      set
    else if builtins.hasAttr (builtins.head path) set then
      attrByPath (builtins.tail path) default set.${builtins.head path}
    else
      default;
}
