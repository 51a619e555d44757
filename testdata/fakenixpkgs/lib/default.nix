# The few functions of nixpkgs' lib that are used here and by image.nix.
let
  lists = rec {
    optional = cond: x: if cond then [ x ] else [ ];
    optionals = cond: xs: if cond then xs else [ ];
    inherit (builtins) concatMap filter;
    unique = builtins.foldl' (acc: x: if builtins.elem x acc then acc else acc ++ [ x ]) [ ];
    toList = x: if builtins.isList x then x else [ x ];
  };
  strings = rec {
    inherit (builtins) concatStringsSep stringLength;
    concatMapStringsSep = sep: f: xs: concatStringsSep sep (map f xs);
    hasPrefix = prefix: s: builtins.substring 0 (stringLength prefix) s == prefix;
    optionalString = cond: s: if cond then s else "";
    splitString = sep: s: builtins.filter builtins.isString (builtins.split (escape sep) s);
    escape = builtins.replaceStrings [ "." ] [ "[.]" ];
  };
  attrsets = rec {
    inherit (builtins) mapAttrs attrNames attrValues;
    filterAttrs = keep: set: removeAttrs set (builtins.filter (n: !keep n set.${n}) (attrNames set));
    optionalAttrs = cond: set: if cond then set else { };
    attrByPath =
      path: default: set:
      if path == [ ] then
        set
      else if builtins.isAttrs set && set ? ${builtins.head path} then
        attrByPath (builtins.tail path) default set.${builtins.head path}
      else
        default;
    recursiveUpdate =
      a: b:
      a
      // mapAttrs (
        n: v: if builtins.isAttrs v && builtins.isAttrs (a.${n} or null) then recursiveUpdate a.${n} v else v
      ) b;
  };
  properties = rec {
    mkIf = condition: content: {
      _type = "if";
      inherit condition content;
    };
    mkMerge = contents: {
      _type = "merge";
      inherit contents;
    };
    mkOverride = priority: content: {
      _type = "override";
      inherit priority content;
    };
    mkOptionDefault = mkOverride 1500;
    mkDefault = mkOverride 1000;
    mkImageMediaOverride = mkOverride 60;
    mkForce = mkOverride 50;
    mkOption = option: option // { _type = "option"; };
    mkEnableOption =
      what:
      mkOption {
        type = (import ./types.nix lib).bool;
        default = false;
        description = what;
      };
  };
  lib =
    lists
    // strings
    // attrsets
    // properties
    // {
      types = import ./types.nix lib;
      inherit (import ./modules.nix lib) evalModules;
      version = "0.0.fixture";
    };
in
lib
