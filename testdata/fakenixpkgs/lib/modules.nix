# The module system: as much of it as the fixture needs.
lib:
let
  isType = type: x: builtins.isAttrs x && (x._type or null) == type;
  isOption = isType "option";

  # show is a value as messages have it.
  show =
    x:
    if builtins.isAttrs x && !(x ? drvPath) then
      "{ ${toString (map (n: "${n} = …;") (builtins.attrNames x))} }"
    else if builtins.isFunction x then
      "<function>"
    else
      builtins.toJSON x;
  showDefs = defs: lib.concatMapStringsSep "" (d: "\n- In `${d.file}': ${show d.value}") defs;

  # push moves what stands before a set to each of its attributes: a list of sets.
  push =
    x:
    if isType "merge" x then
      builtins.concatMap push x.contents
    else if isType "if" x then
      map (builtins.mapAttrs (_: lib.mkIf x.condition)) (push x.content)
    else if isType "override" x then
      map (builtins.mapAttrs (_: lib.mkOverride x.priority)) (push x.content)
    else
      [ x ];

  # properties of a value: [ { priority, value } ].
  values =
    x:
    if isType "merge" x then
      builtins.concatMap values x.contents
    else if isType "if" x then
      lib.optionals x.condition (values x.content)
    else if isType "override" x then
      map (v: v // { inherit (x) priority; }) (values x.content)
    else
      [
        {
          priority = 100;
          value = x;
        }
      ];

  # discharge leaves the definitions of the highest priority.
  discharge =
    defs:
    let
      all = builtins.concatMap (d: map (v: v // { inherit (d) file; }) (values d.value)) defs;
      best = builtins.foldl' (a: v: if v.priority < a then v.priority else a) 9999 all;
    in
    map (v: { inherit (v) file value; }) (builtins.filter (v: v.priority == best) all);

  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? "",
    }:
    let
      args = {
        inherit lib config options;
      }
      // specialArgs;

      # load is a module and all that it imports: [ { key, file, options, config } ].
      load =
        parent: m:
        let
          isFile = builtins.isPath m || builtins.isString m;
          file = if isFile then toString m else m._file or parent;
          content = if isFile then import m else m;
          # Like nixpkgs: what a module doesn't get by name comes from _module.args.
          called =
            if builtins.isFunction content then
              content (args // builtins.mapAttrs (n: _: args.${n} or config._module.args.${n}) (builtins.functionArgs content))
            else
              content;
          whole = called ? config || called ? options;
          imports = builtins.concatMap (load file) (called.imports or [ ]);
        in
        if !builtins.isAttrs called then
          throw "Module `${file}' is of type ${builtins.typeOf called}, but it must be a set or a function."
        else
          imports
          ++ [
            {
              key = if isFile then toString m else null;
              inherit file;
              options = called.options or { };
              config =
                if whole then
                  called.config or { }
                else
                  removeAttrs called [
                    "imports"
                    "_file"
                    "key"
                  ];
            }
          ];

      loaded = builtins.foldl' (
        acc: m: if m.key != null && builtins.any (o: o.key == m.key) acc then acc else acc ++ [ m ]
      ) [ ] (builtins.concatMap (load "<unknown-file>") modules);

      declared = builtins.foldl' (acc: m: lib.recursiveUpdate acc m.options) {
        _module.check = lib.mkOption {
          type = lib.types.bool;
          default = true;
        };
        _module.args = lib.mkOption {
          type = lib.types.lazyAttrsOf lib.types.raw;
          default = { };
        };
      } loaded;

      defined = builtins.concatMap (
        m:
        map (value: {
          inherit (m) file;
          inherit value;
        }) (push m.config)
      ) loaded;

      below =
        name: defs:
        builtins.concatMap (
          d:
          lib.optionals (d.value ? ${name}) (
            map (value: {
              inherit (d) file;
              inherit value;
            }) [ d.value.${name} ]
          )
        ) defs;

      pushed =
        defs:
        builtins.concatMap (
          d:
          map (value: {
            inherit (d) file;
            inherit value;
          }) (push d.value)
        ) defs;

      evalOption =
        loc: option: defs:
        let
          said = discharge (
            defs
            ++ lib.optional (option ? default) {
              file = "<default>";
              value = lib.mkOptionDefault option.default;
            }
          );
        in
        option
        // {
          isDefined = defs != [ ] && discharge defs != [ ];
          value =
            if said == [ ] then
              throw "The option `${loc}' was accessed but has no value defined. Try setting the option."
            else
              option.type.merge loc said;
        };

      tree =
        loc: decls: defs:
        builtins.mapAttrs (
          name: decl:
          if isOption decl then
            evalOption "${loc}${name}" decl (below name defs)
          else
            tree "${loc}${name}." decl (pushed (below name defs))
        ) decls;

      options = tree prefix declared defined;

      valuesOf = builtins.mapAttrs (_: o: if isOption o then o.value else valuesOf o);

      # unknown are the definitions that no option takes.
      unknown =
        loc: decls: defs:
        builtins.concatMap (
          d:
          builtins.concatMap (
            name:
            let
              here = [
                {
                  inherit (d) file;
                  value = d.value.${name};
                }
              ];
            in
            if !(decls ? ${name}) then
              # A definition that a false condition guards is none.
              map (v: v // { loc = "${loc}${name}"; }) (discharge here)
            else if isOption decls.${name} then
              [ ]
            else
              unknown "${loc}${name}." decls.${name} (pushed here)
          ) (builtins.attrNames d.value)
        ) defs;

      raw = valuesOf options;
      wrong = unknown prefix declared defined;
      config =
        if raw._module.check && wrong != [ ] then
          let
            first = (builtins.head wrong).loc;
          in
          throw "The option `${first}' does not exist. Definition values:${
            showDefs (builtins.filter (d: d.loc == first) wrong)
          }"
        else
          raw;
    in
    {
      inherit options config;
      extendModules =
        more:
        evalModules {
          inherit prefix;
          modules = modules ++ more.modules;
          specialArgs = specialArgs // (more.specialArgs or { });
        };
    };
in
{
  inherit evalModules discharge showDefs;
}
