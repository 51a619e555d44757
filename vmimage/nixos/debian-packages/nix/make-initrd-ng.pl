# make-initrd-ng LIST.json ROOT: copies files, and what their links, ELF headers and dlopen notes name.
# LIST = [ { source, target?, dlopen? { usePriority, features } } ]
# Stands in for NixOS's own program, which is written in Rust.
use strict;
use warnings;
use JSON::PP;
use File::Copy;
use File::Path 'make_path';

umask 022;
my ( $list, $root ) = @ARGV;
my ( @queue, %seen );
my %rank = ( required => 0, recommended => 1, suggested => 2 );

sub read_file {
    my ($path) = @_;
    open my $f, "<:raw", $path or return;
    local $/;
    return <$f>;
}

sub push_path {
    my ( $path, $dlopen ) = @_;
    my $key = "$path " . ( $dlopen ? "d" : "" );
    push @queue, [ $path, $dlopen ] unless $seen{$key}++;
}

sub cstring {
    my ( $bytes, $at ) = @_;
    return substr $bytes, $at, index( $bytes, "\0", $at ) - $at;
}

# sections BYTES: name → [offset, size]; of 64-bit little-endian ELF only.
sub sections {
    my ($bytes) = @_;
    return unless substr( $bytes, 0, 6 ) eq "\x7fELF\x02\x01";
    my ($table) = unpack "Q<", substr $bytes, 40, 8;
    my ( $entry, $count, $names_at ) = unpack "v3", substr $bytes, 58, 6;
    return unless $table && $table + $count * $entry <= length $bytes;
    my @headers;
    for my $i ( 0 .. $count - 1 ) {
        my ( $name, undef, undef, undef, $offset, $size ) =
          unpack "V V Q< Q< Q< Q<", substr $bytes, $table + $i * $entry, $entry;
        push @headers, [ $name, $offset, $size ];
    }
    my $names = substr $bytes, $headers[$names_at][1], $headers[$names_at][2];
    return { map { cstring( $names, $_->[0] ) => [ $_->[1], $_->[2] ] } @headers };
}

# dlopen_notes BYTES SECTION DLOPEN: the libraries that systemd's programs say they load by themselves.
sub dlopen_notes {
    my ( $bytes, $note, $dlopen ) = @_;
    my ( $at, $end ) = ( $note->[0], $note->[0] + $note->[1] );
    my @need;
    while ( $at + 12 <= $end ) {
        my ( $name_size, $size ) = unpack "V V", substr $bytes, $at, 8;
        my $data = $at + 12 + ( ( $name_size + 3 ) & ~3 );
        my $json = substr( $bytes, $data, $size ) =~ s/\0.*//sr;
        $at = $data + ( ( $size + 3 ) & ~3 );
        my $notes = eval { decode_json($json) } || [];
        for (@$notes) {
            my $feature = $_->{feature};
            push @need, @{ $_->{soname} }
              if $rank{ $dlopen->{usePriority} } >= $rank{ $_->{priority} // "recommended" }
              || defined $feature && grep { $_ eq $feature } @{ $dlopen->{features} || [] };
        }
    }
    return @need;
}

sub push_needed {
    my ( $file, $dlopen ) = @_;
    my $bytes = read_file($file) // return;
    my $s     = sections($bytes) // return;
    if ( $s->{".interp"} ) {
        # Debian's libc itself names /lib64.
        my $interpreter = cstring( $bytes, $s->{".interp"}[0] );
        push_path( $interpreter, $dlopen ) if $interpreter =~ m{^/nix/} && -e $interpreter;
    }
    my ( $dynamic, $strings ) = @$s{ ".dynamic", ".dynstr" };
    return unless $dynamic && $strings;
    my ( @need, $rpath );
    for ( my $at = $dynamic->[0] ; $at < $dynamic->[0] + $dynamic->[1] ; $at += 16 ) {
        my ( $tag, $value ) = unpack "Q< Q<", substr $bytes, $at, 16;
        last if $tag == 0;
        push @need, cstring( $bytes, $strings->[0] + $value ) if $tag == 1;
        $rpath = cstring( $bytes, $strings->[0] + $value ) if $tag == 29 || $tag == 15 && !defined $rpath;
    }
    push @need, dlopen_notes( $bytes, $s->{".note.dlopen"}, $dlopen ) if $dlopen && $s->{".note.dlopen"};
    for my $library (@need) {
        my ($folder) = grep { -e "$_/$library" } split /:/, $rpath // "";
        if    ( defined $folder )               { push_path( "$folder/$library", $dlopen ) }
        elsif ( $library !~ /^(ld-.*|libc)\.so/ ) { warn "make-initrd-ng: $file: no $library\n" }
    }
}

sub place {
    my ( $source, $link ) = @_;
    symlink $source, $link or warn "$link: $!\n";
}

# handle PATH: copies it, part by part, so that links on the way are kept.
sub handle {
    my ( $path, $dlopen ) = @_;
    my @rest = grep { length && $_ ne "." } split m{/}, $path;
    my @at;
    while (@rest) {
        my $part = shift @rest;
        if ( $part eq ".." ) { pop @at; next }
        push @at, $part;
        my $source = "/" . join "/", @at;
        my $copy   = "$root$source";
        if ( -l $source ) {
            my $target = readlink $source;
            symlink $target, $copy unless -l $copy || -e $copy;
            pop @at;
            my $next = join "/", $target =~ m{^/} ? $target : ( "", @at, $target ), @rest;
            push_path( $next, $dlopen ) if -e $next;
            return;
        }
        if ( -d $source ) {
            mkdir $copy unless -d $copy;
            next if @rest;
            opendir my $folder, $source or die "$source: $!";
            push_path( "$source/$_", $dlopen ) for grep { !/^\.\.?$/ } readdir $folder;
        }
        elsif ( -f $source ) {
            unless ( -e $copy ) {
                copy( $source, $copy ) or die "$source: $!";
                chmod( ( ( stat $source )[2] & 0777 ) | 0200, $copy );
                push_needed( $source, $dlopen );
            }
            my $wrapped = $source =~ s{([^/]+)$}{.$1-wrapped}r;
            push_path( $wrapped, $dlopen ) if -e $wrapped;
        }
        else { die "make-initrd-ng: no $source\n" }
    }
}

for my $entry ( @{ decode_json( read_file($list) // die "$list: $!" ) } ) {
    push_path( $entry->{source}, $entry->{dlopen} );
    next unless defined $entry->{target};
    my $target = "$root/$entry->{target}";
    # A real folder with links in it: see module.nix on udevd.
    if ( $target =~ m{/udev/rules\.d$} ) {
        make_path($target);
        place( $_, $target . s{.*/}{/}r ) for glob "$entry->{source}/*";
        next;
    }
    make_path( $target =~ s{/[^/]*$}{}r );
    place( $entry->{source}, $target );
}
while ( my $next = shift @queue ) { handle(@$next) }
