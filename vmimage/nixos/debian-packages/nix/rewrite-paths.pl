# Rewrites /usr/bin/NAME, /bin/NAME, /usr/lib/systemd and the like in the text files of $out to the store, where the
# package itself or one of $tools has them.
use strict;
use warnings;
use File::Find;

my $out   = $ENV{out};
my @tools = ( $out, split ' ', $ENV{tools} // "" );

sub program {
    my ( $name, $original ) = @_;
    for (@tools) { return "$_/bin/$name" if -e "$_/bin/$name" }
    return $ENV{sh} if $name eq "sh" && $ENV{sh};
    return $original;
}

sub rewrite {
    return if -l $_ || !-f $_ || -s $_ > 2_000_000;
    return if m{/(zoneinfo|terminfo|hwdb\.d|perl|perl5|perl-base|keymaps|consolefonts)/};
    return unless m{/(bin|libexec|etc|example)/|/lib/(systemd|udev|tmpfiles\.d|nix)/|/share/dbus-1/};
    open my $in, "<:raw", $_ or return;
    my $text = do { local $/; <$in> };
    close $in;
    return if !defined $text || $text =~ /\0/;
    my $before = $text;
    $text =~ s{(?<![\w.\$\}])((?:/usr)?/s?bin/([\w.+-]+))}{program($2, $1)}ge;
    $text =~ s{/usr/(lib|libexec)/(systemd|udev|nix|polkit-1)\b}{-e "$out/$1/$2" ? "$out/$1/$2" : "/usr/$1/$2"}ge;
    return if $text eq $before;
    my $mode = ( stat $_ )[2] & 07777;
    chmod $mode | 0200, $_;
    open my $file, ">:raw", $_ or die "$_: $!";
    print $file $text;
    close $file or die "$_: $!";
    chmod $mode, $_;
}

find( { no_chdir => 1, wanted => \&rewrite }, $out );
