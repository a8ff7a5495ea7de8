// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {
    IAccessControlDefaultAdminRules
} from "@openzeppelin/contracts/access/extensions/IAccessControlDefaultAdminRules.sol";
import {AdapterRegistry} from "../src/AdapterRegistry.sol";
import {IAdapterRegistry} from "../src/interfaces/IAdapterRegistry.sol";
import {Base} from "./Base.sol";
import {VM} from "./Vm.sol";

contract AdapterRegistryTest is Base {
    uint64 private constant NOTICE = 7 days;
    bytes32 private constant DIGEST = keccak256("adapter");
    bytes32 private constant BASE_MODEL = keccak256("base model");

    AdapterRegistry private registry;
    address private admin = person("admin");
    address private owner = person("owner");
    address private stranger = person("stranger");

    function setUp() public {
        VM.warp(1_800_000_000);
        registry = new AdapterRegistry(admin, NOTICE);
    }

    function test_register_emits_both_events() public {
        VM.expectEmit(address(registry));
        emit IAdapterRegistry.ModelRegistered(owner, DIGEST, BASE_MODEL, "name", "https://example.org/a");
        VM.expectEmit(address(registry));
        emit IAdapterRegistry.TermsPublished(owner, DIGEST, 1, termsHash("{}"), uint64(block.timestamp), "{}");
        registerAs(owner, DIGEST);
        checkModel(owner, 1, termsHash("{}"), uint64(block.timestamp), false);
    }

    /// @dev The hash is the contract's own: whatever document is in the event has the hash that is kept.
    function testFuzz_hash_is_of_the_document(string calldata document) public {
        VM.assume(bytes(document).length > 0);
        VM.prank(owner);
        registry.register(DIGEST, bytes32(0), "name", "uri", document);
        checkTermsHash(termsHash(document));
    }

    function test_terms_of_another_document_have_another_hash() public {
        registerAs(owner, DIGEST);
        VM.prank(owner);
        registry.publishTerms(DIGEST, "{ }");
        (,, bytes32 hash,,) = registry.modelOf(owner, DIGEST);
        assertTrue(hash != termsHash("{}") && hash == termsHash("{ }"));
    }

    function test_terms_are_never_retroactive() public {
        registerAs(owner, DIGEST);
        VM.warp(block.timestamp + 1 hours);
        uint64 effectiveAt = uint64(block.timestamp) + NOTICE;
        VM.expectEmit(address(registry));
        emit IAdapterRegistry.TermsPublished(owner, DIGEST, 2, termsHash("[2]"), effectiveAt, "[2]");
        VM.prank(owner);
        registry.publishTerms(DIGEST, "[2]");
        checkModel(owner, 2, termsHash("[2]"), effectiveAt, false);
    }

    function test_versions_count_up_and_their_order_is_that_of_their_effect() public {
        registerAs(owner, DIGEST);
        uint64 last = uint64(block.timestamp);
        for (uint32 version = 2; version < 6; ++version) {
            if (version % 2 == 0) VM.warp(block.timestamp + 1); // else in the same block
            VM.prank(owner);
            registry.publishTerms(DIGEST, VM.toString(version));
            (, uint32 got,, uint64 effectiveAt,) = registry.modelOf(owner, DIGEST);
            assertEq(got, version);
            assertTrue(effectiveAt >= last && effectiveAt == block.timestamp + NOTICE);
            last = effectiveAt;
        }
    }

    function test_nobody_takes_somebody_elses_model() public {
        registerAs(owner, DIGEST);
        registerAs(stranger, DIGEST); // a key of the stranger's own
        VM.prank(stranger);
        registry.publishTerms(DIGEST, "[9]");
        VM.prank(stranger);
        registry.revoke(DIGEST);
        checkModel(owner, 1, termsHash("{}"), uint64(block.timestamp), false);
    }

    function test_only_what_one_owns_can_be_changed() public {
        bytes memory unknown = abi.encodeWithSelector(IAdapterRegistry.UnknownModel.selector, stranger, DIGEST);
        registerAs(owner, DIGEST);
        VM.startPrank(stranger);
        VM.expectRevert(unknown);
        registry.publishTerms(DIGEST, "[9]");
        VM.expectRevert(unknown);
        registry.setAccess(DIGEST, "{}");
        VM.expectRevert(unknown);
        registry.revoke(DIGEST);
    }

    function test_register_twice() public {
        registerAs(owner, DIGEST);
        VM.expectRevert(abi.encodeWithSelector(IAdapterRegistry.ModelAlreadyRegistered.selector, owner, DIGEST));
        registerAs(owner, DIGEST);
    }

    function test_revoked_is_for_good() public {
        registerAs(owner, DIGEST);
        VM.expectEmit(address(registry));
        emit IAdapterRegistry.ModelRevoked(owner, DIGEST);
        VM.startPrank(owner);
        registry.revoke(DIGEST);
        bytes memory gone = abi.encodeWithSelector(IAdapterRegistry.ModelIsRevoked.selector, owner, DIGEST);
        VM.expectRevert(gone);
        registry.publishTerms(DIGEST, "[2]");
        VM.expectRevert(gone);
        registry.setAccess(DIGEST, "{}");
        VM.expectRevert(gone);
        registry.revoke(DIGEST);
        VM.expectRevert(abi.encodeWithSelector(IAdapterRegistry.ModelAlreadyRegistered.selector, owner, DIGEST));
        registry.register(DIGEST, BASE_MODEL, "name", "uri", "{}");
        checkModel(owner, 1, termsHash("{}"), uint64(block.timestamp), true);
    }

    function test_access_is_said() public {
        registerAs(owner, DIGEST);
        VM.expectEmit(address(registry));
        emit IAdapterRegistry.AccessChanged(owner, DIGEST, "{\"kind\":\"public\"}");
        VM.prank(owner);
        registry.setAccess(DIGEST, "{\"kind\":\"public\"}");
    }

    function test_bad_values_are_refused() public {
        VM.startPrank(owner);
        VM.expectRevert(IAdapterRegistry.ZeroDigest.selector);
        registry.register(bytes32(0), BASE_MODEL, "name", "uri", "{}");
        VM.expectRevert(abi.encodeWithSelector(IAdapterRegistry.OwnBase.selector, DIGEST));
        registry.register(DIGEST, DIGEST, "name", "uri", "{}");
        VM.expectRevert(abi.encodeWithSelector(IAdapterRegistry.InvalidLength.selector, 0, 128));
        registry.register(DIGEST, BASE_MODEL, "", "uri", "{}");
        VM.expectRevert(abi.encodeWithSelector(IAdapterRegistry.InvalidLength.selector, 2049, 2048));
        registry.register(DIGEST, BASE_MODEL, "name", string(new bytes(2049)), "{}");
        VM.expectRevert(abi.encodeWithSelector(IAdapterRegistry.InvalidLength.selector, 32769, 32768));
        registry.register(DIGEST, BASE_MODEL, "name", "uri", string(new bytes(32769)));
        VM.expectRevert(abi.encodeWithSelector(IAdapterRegistry.InvalidLength.selector, 0, 32768));
        registry.register(DIGEST, BASE_MODEL, "name", "uri", "");
        registry.register(DIGEST, BASE_MODEL, string(new bytes(128)), string(new bytes(2048)), string(new bytes(32768)));
        VM.expectRevert(abi.encodeWithSelector(IAdapterRegistry.InvalidLength.selector, 0, 32768));
        registry.setAccess(DIGEST, "");
    }

    function test_parameters_have_versions_and_notice() public {
        letPublish(stranger);
        bytes32 first = parametersHash("[1]");
        VM.expectEmit(address(registry));
        emit IAdapterRegistry.ParametersPublished(1, first, uint64(block.timestamp), "[1]");
        VM.prank(stranger);
        registry.publishParameters("[1]");
        VM.prank(stranger);
        registry.publishParameters("[2]");
        (uint32 version, bytes32 digest, uint64 effectiveAt) = registry.parameters();
        assertEq(version, 2);
        assertEq(digest, parametersHash("[2]"));
        assertEq(effectiveAt, block.timestamp + NOTICE);
        assertEq(registry.notice(), NOTICE);
    }

    function test_parameters_by_nobody_else_not_even_the_admin() public {
        bytes32 role = registry.PARAMETERS_ROLE();
        address[2] memory others = [stranger, admin];
        for (uint256 i = 0; i < 2; ++i) {
            VM.expectRevert(
                abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, others[i], role)
            );
            VM.prank(others[i]);
            registry.publishParameters("[1]");
        }
    }

    function test_role_taken_back_or_renounced() public {
        letPublish(stranger);
        bytes32 role = registry.PARAMETERS_ROLE();
        VM.prank(stranger);
        registry.renounceRole(role, stranger);
        assertTrue(!registry.hasRole(role, stranger));
        letPublish(stranger);
        VM.prank(admin);
        registry.revokeRole(role, stranger);
        VM.expectRevert(
            abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, stranger, role)
        );
        VM.prank(stranger);
        registry.publishParameters("[1]");
    }

    function test_admin_changes_only_after_the_delay() public {
        VM.prank(admin);
        registry.beginDefaultAdminTransfer(stranger);
        uint48 ripe = uint48(block.timestamp) + uint48(NOTICE);
        VM.warp(ripe);
        VM.expectRevert(
            abi.encodeWithSelector(
                IAccessControlDefaultAdminRules.AccessControlEnforcedDefaultAdminDelay.selector, ripe
            )
        );
        VM.prank(stranger);
        registry.acceptDefaultAdminTransfer();
        VM.warp(ripe + 1);
        VM.prank(stranger);
        registry.acceptDefaultAdminTransfer();
        assertEq(registry.defaultAdmin(), stranger);
    }

    function registerAs(address sender, bytes32 digest) private {
        VM.prank(sender);
        registry.register(digest, BASE_MODEL, "name", "https://example.org/a", "{}");
    }

    function letPublish(address account) private {
        bytes32 role = registry.PARAMETERS_ROLE();
        VM.prank(admin);
        registry.grantRole(role, account);
    }

    function termsHash(string memory document) private pure returns (bytes32) {
        return sha256(abi.encodePacked("openlora/model-terms/v1", document));
    }

    function parametersHash(string memory document) private pure returns (bytes32) {
        return sha256(abi.encodePacked("openlora/parameters/v1", document));
    }

    function checkTermsHash(bytes32 expected) private view {
        (,, bytes32 hash,,) = registry.modelOf(owner, DIGEST);
        assertEq(hash, expected);
    }

    function checkModel(address owner_, uint32 version, bytes32 hash, uint64 effectiveAt, bool revoked) private view {
        (bytes32 base, uint32 gotVersion, bytes32 gotHash, uint64 gotEffectiveAt, bool gotRevoked) =
            registry.modelOf(owner_, DIGEST);
        assertEq(base, BASE_MODEL);
        assertEq(gotVersion, version);
        assertEq(gotHash, hash);
        assertEq(gotEffectiveAt, effectiveAt);
        assertTrue(gotRevoked == revoked);
    }
}
