# A type checks a value and merges definitions: [ { file, value } ], all of the
# highest priority. Errors are worded as nixpkgs words them.
lib:
let
  inherit (import ./modules.nix lib) discharge evalModules showDefs;

  checked =
    type: loc: defs:
    let
      wrong = builtins.filter (d: !type.check d.value) defs;
    in
    if wrong == [ ] then
      defs
    else
      throw "A definition for option `${loc}' is not of type `${type.description}'. Definition values:${showDefs wrong}";

  # One value, however often it is said.
  single =
    type: loc: defs:
    let
      all = checked type loc defs;
      first = (builtins.head all).value;
    in
    if builtins.all (d: d.value == first) all then
      first
    else
      throw "The option `${loc}' has conflicting definition values:${showDefs all}\nUse `lib.mkForce value` or `lib.mkDefault value` to change the priority on any of these definitions.";

  mk =
    description: check: merge:
    let
      self = {
        inherit description check;
        merge = merge self;
      };
    in
    self;
in
rec {
  str = mk "string" builtins.isString single;
  bool = mk "boolean" builtins.isBool single;
  int = mk "signed integer" builtins.isInt single;
  package = mk "package" (x: x ? drvPath || builtins.isPath x) single;
  raw = mk "raw value" (_: true) (
    _: loc: defs:
    if builtins.length defs == 1 then
      (builtins.head defs).value
    else
      throw "The option `${loc}' is defined multiple times while it's expected to be unique.\n\nDefinition values:${showDefs defs}"
  );
  nullOr =
    type:
    mk "null or ${type.description}" (x: x == null || type.check x) (
      self: loc: defs:
      if builtins.all (d: d.value == null) defs then null else type.merge loc (checked self loc defs)
    );
  lines = mk "strings concatenated with \"\\n\"" builtins.isString (
    self: loc: defs: builtins.concatStringsSep "\n" (map (d: d.value) (checked self loc defs))
  );
  listOf =
    type:
    mk "list of ${type.description}" builtins.isList (
      self: loc: defs:
      builtins.concatMap (
        d:
        map (
          value:
          type.merge "${loc}.*" [
            {
              inherit (d) file;
              inherit value;
            }
          ]
        ) d.value
      ) (checked self loc defs)
    );
  attrsOf = attrs (one: names: builtins.filter (name: one name != [ ]) names);
  # One whose values may depend on each other: that a condition removes one isn't seen.
  lazyAttrsOf = attrs (_: names: names);
  attrs =
    defined: type:
    mk "attribute set of ${type.description}" builtins.isAttrs (
      self: loc: defs:
      let
        all = checked self loc defs;
        names = lib.unique (builtins.concatMap (d: builtins.attrNames d.value) all);
        one = name: discharge (builtins.concatMap (d: lib.optional (d.value ? ${name}) {
          inherit (d) file;
          value = d.value.${name};
        }) all);
      in
      builtins.listToAttrs (
        map (name: {
          inherit name;
          value = type.merge "${loc}.${name}" (one name);
        }) (defined one names)
      )
    );
  # A module that someone else will evaluate.
  deferredModule = mk "module" (x: builtins.isAttrs x || builtins.isFunction x || builtins.isPath x || builtins.isString x) (
    _: _: defs: { imports = map (d: d.value) defs; }
  );
  submodule =
    options:
    mk "submodule" builtins.isAttrs (
      self: loc: defs:
      (evalModules {
        prefix = "${loc}.";
        modules = [ { inherit options; } ] ++ map (d: {
          _file = d.file;
          config = d.value;
        }) (checked self loc defs);
      }).config
    );
}
