"""Text that does something where it is not quoted: mostly, it makes a file named CANARY."""

CANARY = "canary"
HOSTILE = {
    "single quote": f"a'; touch {CANARY}; '",
    "double quote": f'a"; touch {CANARY}; "',
    "both quotes": f"""'"; touch {CANARY} #'"\'""",
    "command substitution": f"$(touch {CANARY})",
    "quoted command substitution": f'"$(touch {CANARY})"',
    "backticks": f"`touch {CANARY}`",
    "semicolon": f"a; touch {CANARY}",
    "ampersand and pipe": f"a & touch {CANARY} | b && c",
    "redirection": f"a > {CANARY} < b",
    "spaces": "  two  spaces ",
    "tab": "a\tb",
    "variable": "$HOME ${PATH} $0 $$ !!",
    "glob": "* ? [a-z] {a,b} ~",
    "trailing backslash": "a\\",
    "backslashes": r"a\ \n \" \'",
    "comment": "a # b",
    "sbatch directive": "#SBATCH --hold",
    "options": "a --hold --account=root",
    "template": "{{ spec }} {% raw %} {# #}",
    "unicode": "Zoë 模型 🧪 \u2028 \u00a0",
    "here-document's end": "RANK",
    "percent": "%j %x",
}
