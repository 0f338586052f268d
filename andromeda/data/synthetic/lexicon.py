"""Words for verse, by what they do in a line and by their syllables, and a count of the syllables of any word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from andromeda.data.synthetic.words import words

BySyllables: TypeAlias = Mapping[int, tuple[str, ...]]


def _words(*lists: str) -> BySyllables:
    """Of one syllable, of two, of three."""
    return {number: words(text) for number, text in enumerate(lists, start=1)}


THE = _words("the")
ADJECTIVES = _words(
    "bare bleak bold brave brief bright broad brown calm clear cold cool damp dark deep dim dry dull faint fair far "
    "frail fresh glad gold grand gray green hard high hushed keen kind large last late lean light lone long lost "
    "low mild near new numb odd old plain poor proud quick rich rough sad safe sharp short small smooth soft still "
    "strange strong sweet tall thin true vast warm weak white wise young",
    "amber ancient aging azure bitter broken careful crimson distant dusty eager early earthy empty endless faded "
    "faithful fallen fearless fragrant frosty frozen gentle golden graceful hidden hollow humble icy idle inland "
    "inner jagged joyful kindly languid lonely lovely lucky mellow misty modest morning narrow nimble noble open "
    "outer patient peaceful placid restless rising rugged rustic sacred sandy secret silent silver simple sleepy "
    "slender solemn somber tender timid tranquil urgent upright velvet verdant weary winding windswept woven "
    "yearning yellow youthful",
    "abundant bewildered colossal delicate enchanted enduring evergreen forgotten glittering harvested imagined "
    "jubilant luminous majestic nocturnal quivering radiant scattering silvery turbulent unbroken unspoken "
    "untroubled vanishing wandering whispering",
)
SUBJECTS = _words(  # in the plural
    "birds boats bells clouds crows deer doves dreams elms flames geese ghosts gulls hills hounds lambs larks "
    "leaves moths oaks owls pines reeds roots sails seeds snails stars streams swans thoughts trees vines waves "
    "weeds winds wolves wrens",
    "acorns anchors apples arrows badgers beacons children cuckoos daughters dragons eagles embers falcons farmers "
    "ferrets gardens gliders herons hunters islands kittens lanterns lilies meadows mountains nettles orchards "
    "otters pilgrims planets poppies quarries rabbits ravens rivers robins rushes sailors shadows shepherds sisters "
    "sparrows strangers swallows thistles tulips uncles valleys waters weavers willows",
    "animals butterflies dragonflies elephants emperors gardeners hummingbirds ladybirds messengers nightingales "
    "passengers strawberries tapestries umbrellas violins visitors wanderers waterfalls",
)
OBJECTS = _words(  # in the singular
    "bank barn beach bench bridge church cliff creek dam dawn deck dome edge farm fence field fog gate grove hedge "
    "house ledge loft marsh mill mist moss path peak plank pond porch reef ridge roof shelf shrub surf swamp trench "
    "trunk wharf",
    "alley arbor bottom canyon castle cavern cellar cottage courtyard desert doorway forest garden harbor highland "
    "hillside hollow inlet landing meadow mountain ocean orchard outpost pasture pavement river roadside shadow "
    "summit sunset temple thicket valley village willow window winter",
    "aqueduct avenue cathedral citadel countryside horizon monument promenade riverbank waterfall wilderness",
)
VERBS = _words(  # without an object, in the plural
    "bend blaze bloom bow breathe burn climb crouch dance dash doze drift drop fade fall float fly glide grow hide "
    "kneel leap lean march meet mourn move pause play rest rise roam run sail shine sing sink sleep slide soar spin "
    "stand stir sway swim thrive turn twirl wait walk weep",
    "appear arise ascend awake descend dwindle flicker flourish flutter gather glimmer glisten hover huddle linger "
    "murmur prosper quiver ramble remain return scatter settle shimmer shiver slumber stumble tremble vanish wander "
    "whisper wither",
    "disappear multiply",
)
ADVERBS = _words(
    "here now once still there",
    "again alone away boldly calmly gently gladly homeward inland lightly nightly onward outside proudly slowly "
    "softly sweetly today upward",
    "carefully faithfully forever gracefully patiently peacefully restlessly silently solemnly tenderly together",
)
PREPOSITIONS = _words(
    "by from in near past through",
    "above across along around before behind below beneath beside beyond inside under within",
    "underneath",
)
RHYMES = (  # nouns in the singular; those of a line rhyme
    _words("flight height light night sight", "moonlight twilight"),
    _words("cone stone throne zone", "gravestone"),
    _words("chain lane plain rain train vein", "terrain"),
    _words("key sea tree"),
    _words("bay clay day hay ray way", "pathway"),
    _words("crow glow row snow", "rainbow"),
    _words("ring spring string swing wing"),
    _words("dune moon noon tune", "lagoon"),
    _words("band hand land sand stand strand"),
    _words("hall shawl stall wall", "rainfall"),
    _words("ground hound mound round sound"),
    _words("gale sail tale trail vale"),
    _words("feet heat seat street wheat", "retreat"),
    _words("bed head shed thread"),
    _words("bar car jar star", "bazaar"),
    _words("boat coat moat note"),
    _words("cave grave nave wave"),
    _words("brake cake lake wake", "snowflake"),
    _words("door floor shore store"),
    _words("beam dream gleam steam stream"),
)
ACROSTICS = words(
    "air ale ant arc ark arm art ash autumn badger basket bat bay beacon bee bell bird boat bow branch bread bridge "
    "bright brook bud butter cabin calm camp canary candle cap carpet castle cat cedar cherry clay climb cloud clover "
    "coast cobalt cod copper corn cow cradle creek cup dahlia daisy dam dawn deer den desert desk dew dog donkey dove "
    "dream drift dust eagle earth east echo elf elk elm ember eve falcon fen fennel fern fiddle field fir flame "
    "flower flute fog forest frost garden gem gentle ginger glass gold grass grove hammer harbor harp hat hawk hay "
    "heart hen heron hill hollow home honey hope horn ice ink inn island isle ivory ivy key kite ladder lagoon lake "
    "lamb lamp lark leaf lemon lid light lilac linden linen lion locust log loom map maple marble mat may meadow mill "
    "mint mirror mist moon moss needle nest net nettle night north nut oak oar ocean ode olive onion opal orange "
    "otter owl palm pan panda path pea peach pearl pebble pen pepper pie pigeon pillow pin pine pit plum poem pond "
    "poppy pot potato rain ram raven reed river road robin rocket root rose rye saddle sail salmon salt sand saw sea "
    "seed shell shore silk silver singer sister sky slope snow soil song spark spider spring star stone stork storm "
    "stream summer summit sun sunset swan tea temple tent thorn thread thyme ticket tide timber tin top tower trail "
    "tree tub tug tulip tunnel turtle urn vale van velvet vine violet vow walnut water wave web west wheat wheel "
    "willow wind window wing winter wolf wood wren yak yarn yew"
)

EVERY_LIST = (THE, ADJECTIVES, SUBJECTS, OBJECTS, VERBS, ADVERBS, PREPOSITIONS, *RHYMES)
SYLLABLES = {word: number for by_number in EVERY_LIST for number, some in by_number.items() for word in some}

VOWELS = re.compile("[aeiouy]+")
SILENT = re.compile("[^aeiouyl]es?$|[aeiouy]les?$|[^aeiouydt]ed$")  # sounded in -ble, -ted
HISSING = re.compile("([szxcg]|ch|sh)es$")


def syllables(word: str) -> int:
    """Those of a word, as the lexicon has it; of another word by rule.

    By rule, the groups of vowels are counted, y being one, less an e that is silent at the end: in -e and -es, but for
    -ble and its like and for -ses and its like, and in -ed, but for -ted and -ded. It is at least 1.
    """
    word = word.lower()
    if word in SYLLABLES:
        return SYLLABLES[word]
    silent = SILENT.search(word) and not HISSING.search(word)
    return max(1, len(VOWELS.findall(word)) - bool(silent))
